"""The checks before a PostgreSQL failover (§8.3): the old primary's fence, the standby's fitness, the loss."""

from __future__ import annotations

from collections.abc import Collection

from blocks.environment import Environment
from flows.recovery.point.server_state import SLOTS
from flows.recovery.postgres.pair import Mode, ServerPair
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.units import first_of, size
from tasks.cluster.replaced import read_slots
from tasks.failover.feeding import RECEIVER, own_wal, sources_of
from tasks.failover.fencing import BOOT, Fencing
from tasks.failover.member import find_lost_overrides
from tasks.host.disk import is_here
from tasks.postgres.replication.status import parse_sync_names
from tasks.postgres.replication.synchronous import address
from tasks.wal.branch import number_in_use
from tasks.wal.format.names import lsn_text

MIB = 1 << 20
WAITING = ("on", "remote_apply", "remote_write")


def judge(
    report: Report, env: Environment, pair: ServerPair, mode: Mode, attested: str, fence: bool, limit_bytes: int
) -> None:
    """Judge everything that a promotion needs.

    Raises:
        RunbookFailed: a condition does not hold; nothing was touched.
    """
    _judge_roles(report, pair, mode)
    report.fail_if_critical()
    _judge_identity(report, pair)
    _judge_branch(report, env, pair)
    _judge_replay(report, pair)
    if pair.fencing:
        judge_fencing(report, pair.fencing, attested, fence)
        _judge_silence(report, pair, fence)
    _judge_lag(report, pair, limit_bytes)
    _judge_overrides(report, pair)
    own = {pair.new.slot, pair.old.slot, pair.wal.slot if pair.wal else ""}  # the run makes them
    _judge_slots(report, pair, own)
    report_mode(report, pair)
    report.fail_if_critical()


def _judge_roles(report: Report, pair: ServerPair, mode: Mode) -> None:
    """A planned failover needs one running primary, an unplanned one none; both need a standby in recovery."""
    was, will = pair.was, pair.will
    continues = pair.marker is not None and pair.marker.new == will.address
    if was.is_primary and mode == "unplanned":
        report.fail(
            f"the old primary {was.address} is dead",
            "run it with mode=planned: the old primary is running, and a second one would be a split brain",
            value=f"it takes writes (timeline {was.timeline})",
            expected="no answer",
        )
    if not was.is_primary and mode == "planned" and not continues:
        report.fail(
            f"the primary {was.address} answers",
            "start it, or run this with mode=unplanned if it is dead"
            if was.problem
            else "find out which server has all WAL, then run this with mode=unplanned and new_primary",
            value=was.problem or "it is in recovery",
        )
    if will.problem:
        report.fail(
            f"the standby {will.address} answers",
            "start it and check its log; without a standby run restore-to-point or restore-database",
            value=will.problem,
        )
    elif not will.in_recovery:
        report.fail(
            f"the standby {will.address} is a standby",
            "find out which of the two servers took writes, stop the other one, then run rejoin-standby: this one was "
            "already promoted",
            value=f"it takes writes (timeline {will.timeline})",
            expected="in recovery",
        )
    else:
        report.passed(f"the standby {will.address} is a standby", value="in recovery")


def _judge_identity(report: Report, pair: ServerPair) -> None:
    """The same cluster, and the same timeline."""
    known, mine = {"the old primary": pair.system}, pair.will.timeline
    timelines = {"the old primary": pair.old_timeline}
    for source in sources_of(pair.new, pair.wal, pair.will) if pair.course == "take over" else ():
        if source.problem and source.name == RECEIVER:
            report.warn(
                source.name,
                "let this user read its directory: otherwise the WAL that only it has is lost",
                value=f"it cannot be compared: {source.problem}",
            )
        known |= {source.name: source.system}
        timelines |= {source.name: source.timeline if source.timeline > mine else 0}  # it may be behind
    others = {name: found for name, found in known.items() if found and found != pair.will.system}
    report.require(
        "system identifier",
        not others,
        "correct [standby], or rebuild it with rejoin-standby: it belongs to another cluster",
        value="; ".join(f"{name}: {found}" for name, found in others.items()) or str(pair.will.system),
        expected=f"{pair.will.system}, the standby's",
    )
    if not any(known.values()):
        report.warn("system identifier of the old primary", "compare it with your records", value="unknown")
    if others:
        return
    apart = {name: found for name, found in timelines.items() if found and found != mine}
    report.require(
        "timeline",
        not apart,
        "run rejoin-standby, or promote the server on that timeline: the standby follows another one",
        value="; ".join(f"{name}: {found}" for name, found in apart.items()) or mine,
        expected=f"{mine}, the standby's",
    )


def _judge_branch(report: Report, env: Environment, pair: ServerPair) -> None:
    """The timeline in use, by the archive's record: after an undo a standby may be on the one that was left, and a dead
    primary's files cannot always tell."""
    if pair.course != "take over" or not env.has("backups"):
        return
    mine, problem = pair.will.timeline, ""
    try:
        in_use = number_in_use(env, "backups", pair.will.system)
    except OpsError as error:
        in_use, problem = pair.old_timeline, error.message
    report.require(
        "timeline in use",
        in_use == mine,
        "do not promote this standby: it lacks what was written on the timeline in use. Start the old primary, or run "
        "full-restore, then rejoin-standby",
        value=problem or in_use,
        expected=f"{mine}, the standby's",
    )


def _judge_replay(report: Report, pair: ServerPair) -> None:
    report.require(
        "replay is not paused",
        pair.will.paused == "not paused",
        f"{report.contained}: release-containment resumes it; then run this again"
        if report.contained
        else "SELECT pg_wal_replay_resume() on it, unless it was paused to save data; then run this again",
        value=pair.will.paused,
        expected="not paused",
    )
    if pair.course == "hand over":
        report.require(
            "the standby streams",
            bool(pair.lag and pair.lag.state == "streaming"),
            "check its log and its primary_conninfo, or run rejoin-standby",
            value=pair.lag.state if pair.lag else f"no {pair.new.name or 'name'} is connected",
            expected="streaming",
        )


def judge_fencing(report: Report, fencing: Fencing, attested: str, fence: bool) -> None:
    """Proven, or attested where it cannot be checked from here. An attestation never overrides what is seen."""
    proven = [f"{row.what}: {row.seen}" for row in fencing.rows if row.holds]
    report.table(
        f"Fence of {fencing.server}",
        ("what", "holds", "seen"),
        [(row.what, {True: "proven", False: "no", None: "unknown"}[row.holds], row.seen) for row in fencing.rows],
    )
    for row in fencing.against:
        if fence and row.what != BOOT:
            report.warn(f"the old primary: {row.what}", "nothing to do: this run stops it first", value=row.seen)
        else:
            report.fail(f"the old primary: {row.what}", row.hint, value=row.seen)
    for row in fencing.by_run:
        report.fact(f"the old primary: {row.what}", f"not yet ({row.seen}): this run does it before the promotion")
    if not fencing.against:
        report.prefer("fence, proven", bool(proven), "check the old primary", value="; ".join(proven) or "nothing")
    for row in fencing.unknown:
        if attested:
            report.warn(
                "fence, attested and not proven",
                "keep the evidence: who, how, when",
                value=f"{row.what} ({row.seen}): attested by {attested}",
            )
        else:
            report.fail(f"the old primary: {row.what}", row.hint, value=row.seen, expected="seen")


def _judge_silence(report: Report, pair: ServerPair, fence: bool) -> None:
    """A primary that still sends WAL is running, even if its fence is attested."""
    silent = pair.will.receiver != "streaming"
    seen = pair.will.receiver or "none" if silent else f"{pair.will.address} still receives a stream"
    report.require(
        "the old primary sends no WAL",
        silent,
        "stop the old primary, or set fence=true: it is running",
        value=seen,
        expected="none",
        worst=Status.WARN if fence else Status.CRITICAL,
    )


def _judge_lag(report: Report, pair: ServerPair, limit_bytes: int) -> None:
    """The bytes that the standby lacks: measured on the primary, or in the files of a dead one."""
    if pair.course == "hand over":
        if pair.lag:
            behind = max(pair.lag.flush_bytes, pair.lag.replay_bytes)
            _expect_lag(
                report,
                behind,
                limit_bytes,
                "wait until it catches up (check-replication), or raise max_lag_megabytes: writes pause until it has",
            )
        return
    missing = missing_bytes(pair)
    if missing is None:
        report.warn(
            "lag of the standby",
            "compare with the application's records",
            value="not measured: the old primary's files cannot be read",
        )
        return
    if feeds_old_wal(pair):
        report.fact(
            "WAL that only the old primary has", f"{size(missing)}: the standby replays it before the promotion"
        )
        return
    _expect_lag(
        report,
        missing,
        limit_bytes,
        "start the old primary if possible, or copy its WAL to the standby; accept the loss with max_lag_megabytes",
    )


def _judge_overrides(report: Report, pair: ServerPair) -> None:
    """ALTER SYSTEM changes one server: a promotion reverts it without a word."""
    try:
        overrides = find_lost_overrides(pair.old, pair.new)
    except OpsError as error:
        report.warn("settings of ALTER SYSTEM", error.hint, value=f"not known: {error.message}")
        return
    for name, (before, after) in overrides.items():
        shown = "set otherwise" if name.endswith("_command") else f"{before or 'empty'} → {after or 'empty'}"
        report.warn(
            f"the setting {name}",
            f"ALTER SYSTEM SET {name} on {address(pair.new)} too, and reload it",
            value=f"{shown}: ALTER SYSTEM changed it on {address(pair.old)} only",
        )


def _judge_slots(report: Report, pair: ServerPair, own: Collection[str]) -> None:
    """A standby has the slots that are synchronized to it; a promotion drops the others without a word.

    https://www.postgresql.org/docs/current/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS-SYNCHRONIZATION
    """
    try:
        kept = {slot.name for slot in read_slots(pair.new)}
        lost = [slot for slot in read_slots(pair.old) if slot.name not in {*kept, *own}]
    except OpsError as error:
        report.warn(SLOTS, error.hint, value=f"not known: {error.message}")
        return
    if lost:
        report.warn(
            SLOTS,
            "create them again on the new primary; a logical subscriber needs a new copy of its tables, or "
            "sync_replication_slots (PostgreSQL 17 or newer) before the failover",
            value=first_of([f"{one.name} ({'logical' if one.is_logical else 'physical'})" for one in lost], 10),
            expected=f"none that {address(pair.new)} lacks",
        )


def _expect_lag(report: Report, found: int, limit: int, hint: str) -> None:
    report.require("lag of the standby", found <= limit, hint, value=size(found), expected=f"≤ {size(limit)}")


def missing_bytes(pair: ServerPair) -> int | None:
    """The bytes of a dead primary's WAL that neither standby nor receiver has; None where it cannot be read."""
    if not is_here(pair.old.host) or pair.control is None:
        return None
    own = own_wal(pair.old, pair.will)
    if own is None:
        return None
    reachable = max((source.beyond.end for source in sources_of(pair.new, pair.wal, pair.will)), default=0)
    return max(0, own.beyond.end - max(reachable, pair.will.written))


def feeds_old_wal(pair: ServerPair) -> bool:
    """Whether the standby replays a dead primary's own WAL: it is on this host, and nothing else has all of it. With
    synchronous replication too: a session may set synchronous_commit = local."""
    return pair.course == "take over" and is_here(pair.new.host) and bool(missing_bytes(pair))


def report_mode(report: Report, pair: ServerPair) -> None:
    """Report whether replication is synchronous, and by which source."""
    mode = f"synchronous ({pair.sync_names})" if is_synchronous(pair) else "asynchronous"
    why = "" if pair.sync_commit in WAITING or not pair.sync_names else f", synchronous_commit = {pair.sync_commit}"
    report.fact("replication mode", f"{mode}{why}, by {pair.sync_from}")
    if pair.course == "take over":
        report.fact("position of the standby", f"{lsn_text(pair.will.written)} on timeline {pair.will.timeline}")


def is_synchronous(pair: ServerPair, unread: Collection[str] = ()) -> bool:
    """Whether each acknowledged commit was on the disk of a server whose WAL is replayed here. `unread`: the names of
    those whose WAL cannot be read."""
    names = parse_sync_names(pair.sync_names)
    asked = {name.lower() for name in names.names}
    read = {pair.new.name.lower(), pair.wal.name.lower() if pair.wal else ""} - {"", *map(str.lower, unread)}
    # Each commit waited for `needed` of the names: it is on one that was read, if fewer than that were not.
    return pair.sync_commit in WAITING and "*" not in asked and names.needed > len(asked - read)
