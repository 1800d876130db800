"""The result of a restore key by key, and the clients' writes meanwhile (§2.3)."""

from __future__ import annotations

from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.restore.equal import COLUMNS, KeyComparison
from tasks.redis.restore.prefixes import Restored
from tasks.redis.restore.writes import LiveWrites

MOST_ROWS = 50


def report_restored(report: Report, done: Restored, writes: LiveWrites) -> None:
    """The restored and deleted keys, and how long other clients waited at most."""
    carried = done.carried
    report.fact("keys restored", f"{carried.keys:,} ({size(carried.bytes)} in memory)")
    report.fact("keys expired since the backup", f"{carried.expired:,}")
    why = "clients had just written" if writes.known else "clients may have written"
    report.fact(
        "keys deleted", f"{done.removed:,}" + (f"; {done.spared:,} that {why} were kept" if done.spared else "")
    )
    if carried.large:
        report.fact(
            "values above 1 MiB",
            f"{carried.large:,}, one at a time; the longest took {duration(carried.slowest_seconds)}",
        )
    report_unknown_writes(report, writes.problem)


def report_no_checksum(report: Report) -> None:
    """State what an AOF cannot show. An RDB has a CRC-64 (https://valkey.io/topics/persistence/)."""
    report.fact("AOF", "it has no checksums: a value with a flipped byte loads without an error")


def report_unknown_writes(report: Report, problem: str) -> None:
    """Warn if the server could not report the clients' writes."""
    if problem:
        report.warn(
            "clients' writes meanwhile",
            "permit it: ACL SETUSER … +client|tracking +subscribe +publish &__redis__:invalidate &ops:settled:*",
            value=f"unknown: {problem}",
        )


def judge_comparison(report: Report, found: KeyComparison, writes: LiveWrites | None, back: str) -> None:
    """The live server equals the backup, except for clients' writes. `writes` None: clients could not write meanwhile.

    Raises:
        RunbookFailed: keys differ that no client wrote.
    """
    rows = [row.cells() for row in found.rows]
    report.table("The live server against the backup, key by key", COLUMNS, rows, most=MOST_ROWS)
    known = "" if found.writes_known else "; perhaps clients wrote these: their writes are unknown"
    report.require(
        "live keys equal to the backup",
        not found.differences,
        f"check these keys; undo: {back}" if found.writes_known else "stop the clients that write, then run it again",
        value="; ".join(found.differences[:3]) + known if found.differences else f"{found.equal:,} keys",
        expected="no difference except clients' writes",
        worst=Status.CRITICAL if found.writes_known else Status.WARN,
    )
    if found.written:
        report.warn(
            "written by clients meanwhile",
            "nothing to do if these clients may write: their values are kept and not compared",
            value=f"{found.written:,} keys (or they expired, or were evicted)",
            expected="none",
        )
    if found.replaced:
        report_lost_writes(report, f"up to {found.replaced:,} keys, replaced by the backup's", back)
    if writes is not None:
        report.fact("keys that others wrote during the run", f"{len(writes):,}" if writes.known else "unknown")
    report.fail_if_critical()
    report.outcome = f"{found.equal:,} keys equal the backup's, compared one by one"


def report_lost_writes(report: Report, what: str, back: str) -> None:
    """Clients' writes between the backup of the live data and its replacement are lost."""
    report.warn(
        "clients' writes during the restore are lost",
        f"stop the clients that write before the next restore. Earlier writes are kept: {back}",
        value=what,
        expected="none",
    )
