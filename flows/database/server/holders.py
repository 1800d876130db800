"""Judging what keeps dead rows, and on whom a rebuild waits, called with the open report: vacuum, indexes, replication
choose from one list which of them concern them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runbook.report import Report, Status
from runbook.units import duration
from tasks.postgres.sessions.holders import Holder

LONG_SECONDS = 300
# Of a slot or a standby that is in use nobody knows since when: it counts where it is this many transactions behind.
FAR_BEHIND_XIDS = 1_000_000
MOST_NAMED = 10
MOST_ROWS = 50


def of_database(holders: Sequence[Holder], database: str, long_seconds: float) -> tuple[Holder, ...]:
    """What concerns the tables of one database: its transactions open for longer, and slots and standbys that lag. The
    catalogues' slots and autovacuum's own work do not."""
    return tuple(holder for holder in holders if _concerns(holder, database, long_seconds))


def _concerns(holder: Holder, database: str, long_seconds: float) -> bool:
    match holder.kind:
        case "transaction" | "prepared transaction":
            return holder.database == database and not holder.seconds < long_seconds
        case "replication slot" | "standby":
            return holder.idle or holder.xids >= FAR_BEHIND_XIDS
    return False


def judge_holders(
    report: Report, holders: Sequence[Holder], *, what: str, expected: str = "none", otherwise: Status = Status.WARN
) -> None:
    """One finding for each, with how to end it; one that is well where there is none."""
    for holder in holders[:MOST_NAMED]:
        report.fail(what, holder.remedy, value=holder.text, expected=expected, worst=otherwise)
    if len(holders) > MOST_NAMED:
        report.fail(what, "end those first", value=f"{len(holders) - MOST_NAMED} more", worst=otherwise)
    if not holders:
        report.passed(what, value="none")


def judge_horizon(report: Report, holders: Sequence[Holder], long_seconds: int) -> None:
    """What keeps vacuum from removing dead rows anywhere on the server, all of it in a table."""
    holding = [holder for holder in holders if holder.holds_xmin]
    bad = [holder for holder in holding if _is_long(holder, long_seconds)]
    expected = f"≤ {duration(long_seconds)} and ≤ {FAR_BEHIND_XIDS:,} transactions"
    judge_holders(report, bad, what="holds xmin back", expected=expected)
    report.fact("xmin is held back", holding[0].text if holding else "by nothing")
    report.table(
        f"What holds xmin back ({len(holding)})",
        ("kind", "name", "transactions back", "since", "database", "who"),
        [(h.kind, h.name, f"{h.xids:,}", _since(h), h.database, h.who) for h in holding[:MOST_ROWS]],
    )


def _is_long(holder: Holder, long_seconds: int) -> bool:
    if holder.is_slot and holder.idle and holder.xids > 0:
        return True  # it will hold on for ever, however little it holds now
    return holder.seconds > long_seconds or holder.xids > FAR_BEHIND_XIDS


def _since(holder: Holder) -> str:
    return "not known" if math.isnan(holder.seconds) else duration(holder.seconds)
