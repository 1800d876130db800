"""What a restore key by key says of what it did, and of what clients wrote meanwhile (§2.3)."""

from __future__ import annotations

from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.redis.restore.equal import COLUMNS, Comparison
from tasks.redis.restore.prefixes import Restored
from tasks.redis.restore.writes import Writes

MOST_ROWS = 50


def tell_restored(report: Report, done: Restored, writes: Writes) -> None:
    """What was done, and how long others waited for it at most."""
    carried = done.carried
    report.fact("keys restored", f"{carried.keys:,} ({size(carried.bytes)} in memory)")
    report.fact("keys expired since the backup", f"{carried.expired:,}")
    report.fact(
        "keys removed",
        f"{done.removed:,}" + (f"; {done.spared:,} that clients had just written were spared" if done.spared else ""),
    )
    if carried.large:
        report.fact(
            "values above 1 MiB",
            f"{carried.large:,}, one at a time; the longest was on its way for {duration(carried.slowest_seconds)}",
        )
    tell_unknown(report, writes.problem)


def tell_unknown(report: Report, problem: str) -> None:
    """That the server could not tell what clients write."""
    if problem:
        report.warn(
            "what clients wrote meanwhile",
            "ACL SETUSER … +client|tracking +subscribe +publish &__redis__:invalidate &ops:settled:*",
            value=f"not known: {problem}",
        )


def tell_comparison(report: Report, found: Comparison, writes: Writes | None, back: str) -> None:
    """Whether the live server holds what the backup does; `writes` is None where nobody could write meanwhile.

    Raises:
        RunbookFailed: it does not, and no client is known to have written that.
    """
    rows = [row.cells() for row in found.rows]
    more = f" (the first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
    report.table(f"The live server against the backup, key by key{more}", COLUMNS, rows[:MOST_ROWS])
    known = "" if found.writes_known else "; clients may have written these: what they wrote is not known"
    report.require(
        "live keys equal to the backup",
        not found.differences,
        f"look at these keys; {back}" if found.writes_known else "stop the clients that write there, launch it again",
        value="; ".join(found.differences[:3]) + known if found.differences else f"{found.equal:,} keys",
        expected="no difference but what clients wrote since",
        worst=Status.CRITICAL if found.writes_known else Status.WARN,
    )
    if found.written:
        report.warn(
            "written by clients meanwhile",
            "nothing, if they may: what they wrote stands, and is not compared",
            value=f"{found.written:,} keys (or they expired, or were evicted)",
            expected="none",
        )
    if found.replaced:
        tell_lost(report, f"up to {found.replaced:,} keys, and the backup's took their place", back)
    if writes is not None:
        report.fact("keys that others wrote during the run", f"{len(writes):,}" if writes.known else "not known")
    report.fail_if_critical()
    report.outcome = f"{found.equal:,} keys are as the backup holds them, compared one by one"


def tell_lost(report: Report, what: str, back: str) -> None:
    """What clients wrote after the live data was kept, and before the backup's took its place, is nowhere."""
    report.warn(
        "what clients wrote during the restore is lost",
        f"what they wrote until the live data was kept is in "
        f"there ({back}); next time stop the clients that write before a restore",
        value=what,
        expected="nothing",
    )
