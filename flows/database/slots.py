"""Judging what keeps WAL on the server, slots and archiver, called with the open report."""

from __future__ import annotations

import math
from pathlib import Path

from blocks.postgres import Postgres
from runbook.render import duration, size
from runbook.report import Report, Status
from tasks.host import disk_on
from tasks.postgres.rates import Rates
from tasks.postgres.replication import Replication, Slot

# Time left: somebody must look within the hour, and act at once within a quarter of one.
WARN_SECONDS, CRITICAL_SECONDS = 3600.0, 900.0
# The archiver tries a file that failed again within a minute.
ARCHIVE_WAIT_SECONDS = 300.0


def judge_slots(report: Report, slots: tuple[Slot, ...], rates: Rates, free: int | None, limit: str) -> None:
    """What each slot keeps, and how long until it is lost or the disk is full."""
    rows = []
    for slot in slots:
        lost_first = slot.safe_bytes is not None and (free is None or slot.safe_bytes <= free)
        room = slot.safe_bytes if lost_first else free
        left = math.nan if room is None else rates.wal.seconds_left(room)
        shown = "not measured" if math.isnan(left) else time_left(left)
        end = "until it is lost" if lost_first else "until the disk is full"
        rows.append((slot.name, slot.kind, slot.database, "yes" if slot.active else slot.inactive_since or "no",
                     slot.wal_status, size(slot.held_bytes), "no limit" if slot.safe_bytes is None else
                     size(slot.safe_bytes), f"{shown} {end}",
                     "" if room is None else time_left(rates.wal.seconds_left_on_average(room))))  # fmt: skip
        status, hint = _verdict(slot, left, limit, lost_first)
        value = f"{'active' if slot.active else 'inactive'}, {slot.wal_status}, holds {size(slot.held_bytes)}, "
        value += f"{shown} {end}" if slot.wal_status != "lost" else "its WAL is gone"
        report.expect(f"slot {slot.name}", status is Status.OK, hint, value=value,
                      expected=f"active, more than {duration(WARN_SECONDS)} left", otherwise=status)  # fmt: skip
    columns = (
        "slot",
        "kind",
        "database",
        "active",
        "wal_status",
        "WAL held",
        "safe_wal_size",
        "left",
        "left at the average rate",
    )
    report.table("Slots", columns, rows[:50])


def _verdict(slot: Slot, left: float, limit: str, lost_first: bool) -> tuple[Status, str]:
    drop = f"SELECT pg_drop_replication_slot('{slot.name}')"
    if slot.wal_status == "lost":
        return Status.CRITICAL, f"its consumer can never go on: rebuild it, then {drop}"
    if slot.wal_status == "reserves nothing" or slot.synced:
        return Status.OK, ""
    start = f"start its consumer, or give it up: {drop}"
    if slot.wal_status == "unreserved":
        return Status.CRITICAL, f"the next checkpoint removes its WAL: raise max_slot_wal_keep_size ({limit}), {start}"
    if left < WARN_SECONDS:
        raise_it = f"raise max_slot_wal_keep_size ({limit})" if lost_first else "make room for WAL"
        return Status.CRITICAL if left < CRITICAL_SECONDS else Status.WARN, f"{start}; to win time {raise_it}"
    if not slot.active:
        cap = "" if slot.safe_bytes is not None else "; and cap it: max_slot_wal_keep_size has no limit"
        return Status.WARN, start + cap
    if math.isnan(left):
        return Status.WARN, "set max_slot_wal_keep_size: it has no limit, and pg_wal's disk cannot be seen from here"
    return Status.OK, ""


def judge_archiver(report: Report, found: Replication, rates: Rates, free: int | None) -> None:
    """Whether WAL is archived."""
    archiver, settings = found.archiver, found.settings
    if not settings.archives:
        report.fact("archiving", f"archive_mode is {settings.archive_mode}")
        return
    left = "not measured"
    if free is not None:
        average = time_left(rates.wal.seconds_left_on_average(free))
        left = f"{time_left(rates.wal.seconds_left(free))} at the present rate, {average} at the average one"
    report.fact("archiving", f"last {archiver.last_archived}; {archiver.waiting} files wait")
    failing = archiver.is_failing or rates.failures > 0
    report.expect(
        "archiver",
        not failing and bool(settings.archives_by),
        "read the server's log for archive_command's message and correct it: pg_wal grows until then, and no recovery "
        f"reaches past the last archived file; time until the disk is full: {left}",
        value=f"{archiver.failed} failures, last {archiver.last_failed}; last archived {archiver.last_archived}; "
        f"{archiver.waiting} files wait" + ("" if settings.archives_by else "; no archive_command is set"),
        expected="no failure since the last success",
    )
    if not failing and settings.archives_by:
        report.expect("files that wait for the archiver", archiver.waiting_seconds <= ARCHIVE_WAIT_SECONDS,
                      f"archive_command hangs or is too slow; time until the disk is full: {left}",
                      value=f"{archiver.waiting}, the oldest for {duration(archiver.waiting_seconds)}",
                      expected=f"≤ {duration(ARCHIVE_WAIT_SECONDS)}", otherwise=Status.WARN)  # fmt: skip


def free_for_wal(postgres: Postgres) -> int | None:
    """Free bytes where WAL is written; None where it cannot be seen from here."""
    disk = disk_on(postgres.host, Path(postgres.data_directory) / "pg_wal")
    return disk.free_bytes if disk else None


def time_left(seconds: float) -> str:
    """For people: `12 min 00 s`, `3 days`, and no end where nothing is written."""
    if math.isinf(seconds):
        return "no end (nothing is written)"
    return duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"
