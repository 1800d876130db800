"""Sessions, slots and standbys that hold dead rows back or block a rebuild, called with the open report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runbook.report import Report, Status
from runbook.units import duration
from tasks.postgres.sessions.holders import XminHolder

LONG_SECONDS = 300
# How long an active slot or standby holds rows back is unknown: it counts from this many transactions.
FAR_BEHIND_XIDS = 1_000_000
MOST_NAMED = 10
MOST_ROWS = 50


def of_database(holders: Sequence[XminHolder], database: str, long_seconds: float) -> tuple[XminHolder, ...]:
    """The holders that affect one database's tables: its long transactions, and slots and standbys that lag.

    Catalog slots and autovacuum's own work do not affect them.
    """
    return tuple(holder for holder in holders if _concerns(holder, database, long_seconds))


def _concerns(holder: XminHolder, database: str, long_seconds: float) -> bool:
    match holder.kind:
        case "transaction" | "prepared transaction":
            return holder.database == database and not holder.seconds < long_seconds
        case "replication slot" | "standby":
            return holder.idle or holder.xids >= FAR_BEHIND_XIDS
    return False


def judge_holders(
    report: Report, holders: Sequence[XminHolder], *, what: str, expected: str = "none", otherwise: Status = Status.WARN
) -> None:
    """One finding for each holder with the way to end it; OK if there is none."""
    for holder in holders[:MOST_NAMED]:
        report.fail(what, holder.remedy, value=holder.text, expected=expected, worst=otherwise)
    if len(holders) > MOST_NAMED:
        report.fail(what, "end the ones above first", value=f"{len(holders) - MOST_NAMED} more", worst=otherwise)
    if not holders:
        report.passed(what, value="none")


def judge_horizon(report: Report, holders: Sequence[XminHolder], long_seconds: int) -> None:
    """All holders that keep vacuum from removing dead rows on the server, as findings and as a table."""
    holding = [holder for holder in holders if holder.holds_xmin]
    bad = [holder for holder in holding if _is_long(holder, long_seconds)]
    expected = f"≤ {duration(long_seconds)} and ≤ {FAR_BEHIND_XIDS:,} transactions"
    judge_holders(report, bad, what="holds xmin back", expected=expected)
    report.fact("xmin is held back by", holding[0].text if holding else "nothing")
    report.table(
        f"Holders of xmin ({len(holding)})",
        ("kind", "name", "transactions back", "since", "database", "who"),
        [(h.kind, h.name, f"{h.xids:,}", _since(h), h.database, h.who) for h in holding],
        most=MOST_ROWS,
    )


def _is_long(holder: XminHolder, long_seconds: int) -> bool:
    if holder.is_slot and holder.idle and holder.xids > 0:
        return True  # an idle slot never releases its rows, however few they are now
    return holder.seconds > long_seconds or holder.xids > FAR_BEHIND_XIDS


def _since(holder: XminHolder) -> str:
    return "not known" if math.isnan(holder.seconds) else duration(holder.seconds)
