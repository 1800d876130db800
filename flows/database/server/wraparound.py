"""The distance to transaction id wraparound, called with the open report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runbook.report import Report, Status
from runbook.units import duration, size
from tasks.postgres.replication.rates import Rate
from tasks.postgres.replication.wraparound import STOP_AGE, DatabaseAge, Wraparound

# vacuum_failsafe_age's default: above it vacuum skips everything but freezing.
CRITICAL_AGE = 1_600_000_000
WARN_AGE = 1_000_000_000
WEEK = 7 * 86400.0
MOST_FINDINGS = 10
MOST_ROWS = 50


def judge_wraparound(report: Report, found: Wraparound, xids: Rate, database: str) -> None:
    """The age of the databases, and of the tables of the application's database."""
    worst = found.databases[0]
    left = _left(worst, xids)
    report.fact("transactions", f"{xids.present:,.1f}/s in this run, {xids.mean:,.1f}/s since initdb")
    report.fact("time until transaction ids run out without freezing", _days(left))
    for age in [age for age in found.databases if _status(age, found, xids) is not Status.OK][:MOST_FINDINGS]:
        tables = ", ".join(table.name for table in found.tables[:3]) if age.name == database else "its oldest tables"
        report.fail(
            f"age of database {age.name}",
            f"end the holders of xmin (check-replication lists them), then VACUUM (FREEZE, INDEX_CLEANUP OFF) {tables}",
            value=f"{age.xids:,} transactions, {age.multixacts:,} multixacts; {_days(_left(age, xids))} left",
            expected=f"autovacuum freezes at {found.freeze_max_age:,} and {found.multixact_freeze_max_age:,}",
            worst=_status(age, found, xids),
        )
    if all(_status(age, found, xids) is Status.OK for age in found.databases):
        report.passed(
            "age of the databases",
            value=f"at most {worst.xids:,} ({worst.name})",
            expected=f"autovacuum freezes at {found.freeze_max_age:,}",
        )
    for table in [table for table in found.tables if table.temporary and table.oldest > found.freeze_max_age]:
        report.warn(
            f"temporary table {table.name}",
            "end its session, or drop it: autovacuum cannot freeze it",
            value=f"{table.xids:,}",
        )
    _tables(report, found, xids, database)


def _status(age: DatabaseAge, found: Wraparound, xids: Rate) -> Status:
    """Below its limit autovacuum freezes in time, at any rate of transactions; above it, it has fallen behind."""
    if age.oldest > CRITICAL_AGE:
        return Status.CRITICAL
    late = age.xids > 2 * found.freeze_max_age or age.multixacts > 2 * found.multixact_freeze_max_age
    soon = age.xids > 1.1 * found.freeze_max_age and _left(age, xids) < WEEK
    return Status.WARN if late or soon or age.oldest > WARN_AGE else Status.OK


def _left(age: DatabaseAge, xids: Rate) -> float:
    """Seconds left at the faster of both rates: a few quiet seconds prove nothing."""
    return min(xids.seconds_left(STOP_AGE - age.xids), xids.seconds_left_on_average(STOP_AGE - age.xids))


def _tables(report: Report, found: Wraparound, xids: Rate, database: str) -> None:
    def rows(ages: Sequence[DatabaseAge]) -> list[tuple[object, ...]]:
        return [
            (
                a.name,
                f"{a.xids:,}",
                f"{a.multixacts:,}",
                f"{a.oldest / STOP_AGE:.1%}",
                _days(_left(a, xids)),
                size(a.bytes) if a.bytes else "",
            )
            for a in ages
        ]

    columns = ("name", "age (transactions)", "age (multixacts)", "of the limit", "left without freezing", "size")
    report.table("Wraparound: databases", columns, rows(found.databases), most=MOST_ROWS)
    report.table(f"Wraparound: oldest tables of {database}", columns, rows(found.tables), most=MOST_ROWS)


def _days(seconds: float) -> str:
    if math.isinf(seconds):
        return "unlimited (no transactions)"
    days = seconds / 86400
    return f"{days / 365:,.0f} years" if days > 3650 else f"{days:,.0f} days" if days >= 2 else duration(seconds)
