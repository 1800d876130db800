"""Replication, WAL archiving and wraparound: their state, and the time left until they fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.database.server.holders import judge_horizon
from flows.database.server.wraparound import judge_wraparound
from runbook import metrics
from runbook.flow import flow
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.host.disk import disk_on
from tasks.postgres.replication.rates import Rates, measure_rates, seconds_until
from tasks.postgres.replication.status import (
    DOES_NOT_WAIT,
    Replication,
    Slot,
    Standby,
    parse_sync_names,
    read_replication,
)
from tasks.postgres.replication.wraparound import read_wraparound
from tasks.postgres.sessions.holders import find_holders

# A standby replies every 10 s by default (wal_receiver_status_interval).
SILENT_SECONDS = 25.0
# Less than this can be in transit at any moment.
BEHIND_BYTES = 1_000_000


@flow(name="check-replication", flow_run_name=RunName("check-replication {environment}"))
def check_replication(
    environment: str,
    seconds: Annotated[int, Field(ge=1, le=60)] = 5,
    long_seconds: Annotated[int, Field(ge=1, le=86400)] = 300,
) -> Report:
    """レプリケーション・WAL・周回の確認 (§1)

    Run it daily, and before every planned failover. It shows

    - the data loss of a failover now: replication mode, lag in bytes and seconds
    - the slots and the archiver, and the time left until a slot is lost or the disk is full
    - the sessions, slots and standbys that keep vacuum from removing dead rows
    - the distance of the transaction ids to wraparound

    It reads only. Times left are estimates at the rate measured in this run; tables show the average rate too.
    Evidence: the tables of standbys, slots, holders of xmin, and ages.

    Not in the manual, except one line of its appendix B (lag over 10 s).

    Args:
        environment: Environment (lab, staging, production …)
        seconds: Seconds to measure the growth of WAL and transaction IDs
        long_seconds: Report transactions that take longer than this, in seconds
    """
    env = Environment.find(environment)
    with runbook("Check replication", env) as report:
        rates = measure_rates(env.postgres, seconds)
        found = read_replication(env.postgres)
        holders = find_holders(env.postgres)
        ages = read_wraparound(env.postgres, env.postgres.database)
        report.fact("WAL", f"{_rate(rates.wal.present)} over {rates.seconds:.0f} s, {_rate(rates.wal.mean)} on average")
        if not found.settings.sees_all:
            hint = f"GRANT pg_monitor TO {env.postgres.admin_user}: until then the findings below are incomplete"
            report.warn("statistics of other sessions", hint, value="not measured")
        judge_mode(report, found)
        if env.has("standby"):
            judge_configured(report, found)
        judge_standbys(report, found.standbys, rates.wal.present)
        free = free_for_wal(env.postgres)
        judge_slots(report, found.slots, rates, free, found.settings.max_slot_wal)
        judge_archiver(report, found, rates, free)
        judge_horizon(report, holders, long_seconds)
        judge_wraparound(report, ages, rates.xids, env.postgres.database)
        report.outcome = report.facts["replication mode"]
    return report


def judge_mode(report: Report, found: Replication) -> None:
    """The replication mode in effect; an RPO of 0 needs synchronous replication to another host."""
    settings, names = found.settings, parse_sync_names(found.settings.sync_names)
    if settings.in_recovery:
        report.fact("replication mode", f"this server is a standby ({found.receiver or 'no WAL receiver'})")
        report.prefer(
            "WAL receiver",
            found.receiver.startswith("streaming"),
            "check primary_conninfo and the primary's log; this server may be replaying from the archive",
            value=found.receiver or "none",
            expected="streaming",
        )
        age = found.replay_age_seconds
        report.fact("last replayed transaction", "none" if age is None else f"{duration(age)} ago")
        return
    report.fact("replication mode", _mode(found))
    report.fact("synchronous_commit", "; ".join((settings.sync_commit, *settings.sync_commit_elsewhere)))
    carried = bool(found.physical) or (settings.archives and not found.archiver.is_failing)
    report.prefer(
        "copy of the WAL elsewhere",
        carried,
        "connect a standby or archive WAL: until then losing this host loses every write since the newest backup",
        value="standby or archive" if carried else "none: no standby, no working archiver",
        expected="a standby or an archive",
    )
    if names.needed:
        _judge_sync(report, found)


def judge_configured(report: Report, found: Replication) -> None:
    """Whether a replaying standby is connected, since the environment has a [standby]."""
    if found.settings.in_recovery:
        return
    replaying = [standby for standby in found.physical if standby.replay_bytes is not None]
    report.prefer(
        "standby of the environment",
        bool(replaying),
        "start it and check its log for the reason, or remove [standby] from the environment",
        value=", ".join(s.name or s.address for s in replaying) or "none connected",
        expected="connected",
    )


def _mode(found: Replication) -> str:
    settings, names = found.settings, parse_sync_names(found.settings.sync_names)
    if not names.needed and not found.physical:
        return "no standby is connected: nothing is replicated"
    if not names.needed:
        worst = size(max(standby.flush_bytes for standby in found.physical))
        return f"asynchronous: a standby is up to {worst} behind"
    if settings.sync_commit in DOES_NOT_WAIT:
        return f"asynchronous in effect: synchronous_commit is {settings.sync_commit}, commits wait for no standby"
    waits = {"remote_write": "written (not flushed)", "remote_apply": "replayed"}.get(settings.sync_commit, "flushed")
    by = ", ".join(f"{s.name} at {s.address}" for s in _synchronous(found.standbys)) or "nobody"
    return f"synchronous ({settings.sync_names}): a commit returns when it is {waits} by {names.needed} of: {by}"


def _judge_sync(report: Report, found: Replication) -> None:
    settings, names = found.settings, parse_sync_names(found.settings.sync_names)
    there, unmatched = _synchronous(found.standbys), names.unmatched(found.standbys)
    waits = settings.sync_commit not in DOES_NOT_WAIT
    report.require(
        "standbys that synchronous_standby_names needs",
        len(there) >= names.needed,
        f"start a standby with application_name {' or '.join(unmatched) or 'listed'}: every commit waits forever. Or "
        "accept an RPO above 0: ALTER SYSTEM SET synchronous_standby_names = ''; SELECT pg_reload_conf(). "
        "Do not cancel the waiting sessions: a cancelled wait is reported as committed",
        value=f"{len(there)} of {names.needed} connected; {found.waiting_commits} commits are waiting",
        expected=settings.sync_names,
        worst=Status.CRITICAL if waits else Status.WARN,
    )
    if unmatched and len(there) >= names.needed:
        report.warn(
            "names without a standby",
            "start that standby, or remove the name from synchronous_standby_names",
            value=", ".join(unmatched),
            expected=settings.sync_names,
        )
    report.prefer(
        "synchronous_commit",
        waits and not settings.sync_commit_elsewhere,
        "set it to on, also for the roles and databases named: otherwise their commits can be lost",
        value="; ".join((settings.sync_commit, *settings.sync_commit_elsewhere)),
        expected="on",
    )
    report.judge(
        metrics.COMMIT_WAIT,
        found.waited_seconds,
        "fix the standby's lag. Cancel no waiting session: a cancelled wait is reported as committed",
        of=f"{found.waiting_commits} commits",
        worst=Status.WARN,
    )


def _synchronous(standbys: tuple[Standby, ...]) -> list[Standby]:
    return [standby for standby in standbys if standby.sync_state in ("sync", "quorum")]


def judge_standbys(report: Report, standbys: tuple[Standby, ...], wal_per_second: float) -> None:
    """Lag of each standby in bytes and seconds."""
    limit = report.limit(metrics.REPLICATION_LAG)[0]
    rows = []
    for s in standbys:
        behind = s.flush_bytes if s.replay_bytes is None else s.replay_bytes
        silent = s.silent_seconds > SILENT_SECONDS and behind > 0
        lag = lag_of(s, wal_per_second)
        shown = "unlimited time" if math.isinf(lag) else duration(lag)
        rows.append(
            (
                s.name,
                s.address,
                s.state,
                s.sync_state,
                s.slot or "none",
                size(s.flush_bytes),
                "receives only" if s.replay_bytes is None else size(s.replay_bytes),
                shown,
            )
        )
        report.prefer(
            f"standby {s.name or s.address}",
            s.state == "streaming" and not silent and lag <= limit,
            "check its log, its disk and the network. Replay may be paused (SELECT pg_wal_replay_resume() there) "
            "or blocked by a query (pg_stat_activity there)",
            value=f"{s.state}, {s.sync_state}, {size(behind)} and {shown} behind" + (" (silent)" if silent else ""),
            expected=f"streaming, lag ≤ {metrics.REPLICATION_LAG.show(limit)}",
        )
        if not s.slot and s.state == "streaming":
            report.fact(f"slot of {s.name}", "none: the primary may remove WAL that it still needs (wal_keep_size)")
    columns = ("name", "address", "state", "sync", "slot", "not flushed there", "not replayed there", "lag")
    report.table("Standbys and receivers", columns, rows, most=MOST_ROWS)


def lag_of(standby: Standby, wal_per_second: float = math.inf) -> float:
    """Lag in seconds. The server measures it for the last replayed WAL only, which hides a stopped standby.

    So it is at least the time in which this server writes as much WAL (inf: not measured), and the time since the last
    reply.
    """
    behind = standby.flush_bytes if standby.replay_bytes is None else standby.replay_bytes
    if behind == 0:
        return 0.0
    known = 0.0 if math.isnan(standby.lag_seconds) else standby.lag_seconds
    if behind > BEHIND_BYTES:
        known = max(known, seconds_until(behind, wal_per_second))
    return max(known, standby.silent_seconds) if standby.silent_seconds > SILENT_SECONDS else known


def _rate(per_second: float) -> str:
    return f"{size(per_second)}/s"


# Time left: under an hour somebody must act soon, under 15 minutes at once.
WARN_SECONDS, CRITICAL_SECONDS = 3600.0, 900.0
MOST_ROWS = 50


def judge_slots(report: Report, slots: tuple[Slot, ...], rates: Rates, free: int | None, limit: str) -> None:
    """The WAL that each slot retains, and the time left until the slot is lost or the disk is full."""
    columns = (
        "slot",
        "kind",
        "database",
        "active",
        "wal_status",
        "retained WAL",
        "safe_wal_size",
        "left",
        "left at the average rate",
    )
    rows = [_judge_slot(report, slot, rates, free, limit) for slot in slots]
    report.table("Slots", columns, rows, most=MOST_ROWS)


def _judge_slot(report: Report, slot: Slot, rates: Rates, free: int | None, limit: str) -> tuple[str, ...]:
    """One slot's finding. Returns its row of the table."""
    lost_first = slot.safe_bytes is not None and (free is None or slot.safe_bytes <= free)
    space = slot.safe_bytes if lost_first else free
    left = math.nan if space is None else rates.wal.seconds_left(space)
    shown = "not measured" if math.isnan(left) else time_left(left)
    end = "until it is lost" if lost_first else "until the disk is full"
    status, hint = _verdict(slot, left, limit, lost_first)
    value = f"{'active' if slot.active else 'inactive'}, {slot.wal_status}, retains {size(slot.held_bytes)}, "
    value += f"{shown} {end}" if slot.wal_status != "lost" else "its WAL is deleted"
    report.require(
        f"slot {slot.name}",
        status is Status.OK,
        hint,
        value=value,
        expected=f"active, more than {duration(WARN_SECONDS)} left",
        worst=status,
    )
    return (
        slot.name,
        slot.kind,
        slot.database,
        "yes" if slot.active else str(slot.inactive_since or "no"),
        slot.wal_status,
        size(slot.held_bytes),
        "no limit" if slot.safe_bytes is None else size(slot.safe_bytes),
        f"{shown} {end}",
        "" if space is None else time_left(rates.wal.seconds_left_on_average(space)),
    )


def _verdict(slot: Slot, left: float, limit: str, lost_first: bool) -> tuple[Status, str]:
    drop = f"SELECT pg_drop_replication_slot('{slot.name}')"
    if slot.wal_status == "lost":
        return Status.CRITICAL, f"rebuild its consumer, which cannot continue, then {drop}"
    if slot.wal_status == "reserves nothing" or slot.synced:
        return Status.OK, ""
    start = f"start its consumer, or drop the slot: {drop}"
    if slot.wal_status == "unreserved":
        return Status.CRITICAL, f"raise max_slot_wal_keep_size ({limit}) before the next checkpoint, then {start}"
    if left < WARN_SECONDS:
        raise_it = f"raise max_slot_wal_keep_size ({limit})" if lost_first else "free disk space for WAL"
        return Status.CRITICAL if left < CRITICAL_SECONDS else Status.WARN, f"{start}. To gain time, {raise_it}"
    if not slot.active:
        cap = "" if slot.safe_bytes is not None else ". Also set max_slot_wal_keep_size: it has no limit"
        return Status.WARN, start + cap
    if math.isnan(left):
        return Status.WARN, "set max_slot_wal_keep_size: it has no limit, and this host cannot measure pg_wal's disk"
    return Status.OK, ""


def judge_archiver(report: Report, found: Replication, rates: Rates, free: int | None) -> None:
    """Whether WAL is archived, and in time."""
    archiver, settings = found.archiver, found.settings
    if not settings.archives:
        report.fact("archiving", f"archive_mode is {settings.archive_mode}")
        return
    left = "not measured"
    if free is not None:
        average = time_left(rates.wal.seconds_left_on_average(free))
        left = f"{time_left(rates.wal.seconds_left(free))} at the current rate, {average} at the average rate"
    report.fact("archiving", f"last {archiver.last_archived}; {archiver.waiting} files wait")
    failing = archiver.is_failing or rates.failures > 0
    report.require(
        "archiver",
        not failing and bool(settings.archives_by),
        "find archive_command's error in the server's log and fix it. Until then pg_wal grows and recovery ends at the "
        f"last archived file. Time until the disk is full: {left}",
        value=f"{archiver.failed} failures, last {archiver.last_failed}; last archived {archiver.last_archived}; "
        f"{archiver.waiting} files wait" + ("" if settings.archives_by else "; no archive_command is set"),
        expected="no failure since the last success",
    )
    if not failing and settings.archives_by:
        report.judge(
            metrics.ARCHIVE_WAIT,
            archiver.waiting_seconds,
            f"check archive_command, which hangs or is too slow. Time until the disk is full: {left}",
            of=f"{archiver.waiting} files",
            worst=Status.WARN,
        )


def free_for_wal(postgres: Postgres) -> int | None:
    """Free bytes on pg_wal's disk; None if this host cannot measure it."""
    disk = disk_on(postgres.host, Path(postgres.data_directory) / "pg_wal")
    return disk.free_bytes if disk else None


def time_left(seconds: float) -> str:
    """`12 min 00 s`, `3 days`, or unlimited if nothing is written."""
    if math.isinf(seconds):
        return "unlimited (nothing is written)"
    return duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"
