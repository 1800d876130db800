"""Judging what holds xmin back and the distance to wraparound, called with the open report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runbook.render import duration, size
from runbook.report import Report, Status
from tasks.postgres.horizon import STOP_AGE, Age, Holder, Wraparound
from tasks.postgres.rates import Rate

# So many dead rows' transactions are kept by something of which nobody knows how old it is (slots, feedback).
HELD_XIDS = 1_000_000
# vacuum_failsafe_age's default: past it vacuum drops everything else to freeze.
CRITICAL_AGE = 1_600_000_000
WARN_AGE = 1_000_000_000
WEEK = 7 * 86400.0
MOST_FINDINGS = 10
MOST_ROWS = 50

REMEDY = {
    "transaction": "end it: SELECT pg_terminate_backend({name}) (its client loses what is not committed)",
    "prepared transaction": "COMMIT PREPARED or ROLLBACK PREPARED '{name}', in its database: nobody else ends it",
    "slot": "start its consumer, or SELECT pg_drop_replication_slot('{name}')",
    "slot (catalog)": "start its consumer, or SELECT pg_drop_replication_slot('{name}')",
    "standby feedback": "end the long query on standby {name}, or switch hot_standby_feedback off there",
}


def judge_holders(report: Report, holders: tuple[Holder, ...], long_seconds: int) -> None:
    """What keeps vacuum from removing dead rows."""
    bad = [holder for holder in holders if _is_long(holder, long_seconds)]
    for holder in bad[:MOST_FINDINGS]:
        report.warn(
            f"{holder.kind} {holder.name} holds xmin back",
            REMEDY[holder.kind].format(name=holder.name.replace("'", "''")),
            value=f"{_since(holder)}, {holder.xids:,} transactions back; {holder.detail}",
            expected=f"≤ {duration(long_seconds)} and ≤ {HELD_XIDS:,} transactions",
        )
    oldest = f"{holders[0].xids:,} transactions, by {holders[0].kind} {holders[0].name}" if holders else "by nothing"
    report.fact("xmin is held back", oldest)
    if not bad:
        report.expect("what holds xmin back", True, "", value=oldest, expected=f"nothing over {duration(long_seconds)}")
    report.table(
        f"What holds xmin back ({len(holders)})",
        ("kind", "name", "transactions back", "since", "who"),
        [(h.kind, h.name, f"{h.xids:,}", _since(h), h.detail) for h in holders[:MOST_ROWS]],
    )


def _is_long(holder: Holder, long_seconds: int) -> bool:
    if holder.kind.startswith("slot") and holder.idle and holder.xids > 0:
        return True  # it will hold on for ever, however little it holds now
    return holder.seconds > long_seconds or holder.xids > HELD_XIDS


def _since(holder: Holder) -> str:
    return "not known" if math.isnan(holder.seconds) else duration(holder.seconds)


def judge_wraparound(report: Report, found: Wraparound, xids: Rate, database: str) -> None:
    """Age of the databases, and of the tables of the application's."""
    worst = found.databases[0]
    left = _left(worst, xids)
    report.fact("transactions", f"{xids.present:,.1f}/s in this run, {xids.mean:,.1f}/s since initdb")
    report.fact("until transaction ids run out, were nothing frozen", _days(left))
    for age in [age for age in found.databases if _status(age, found, xids) is not Status.OK][:MOST_FINDINGS]:
        tables = ", ".join(table.name for table in found.tables[:3]) if age.name == database else "its oldest tables"
        report.expect(
            f"age of database {age.name}",
            False,
            f"end what holds xmin back (above), then VACUUM (FREEZE, INDEX_CLEANUP OFF) {tables}",
            value=f"{age.xids:,} transactions, {age.multixacts:,} multixacts; {_days(_left(age, xids))} left",
            expected=f"autovacuum freezes at {found.freeze_max_age:,} and {found.multixact_freeze_max_age:,}",
            otherwise=_status(age, found, xids),
        )
    if all(_status(age, found, xids) is Status.OK for age in found.databases):
        report.expect("age of the databases", True, "", value=f"at most {worst.xids:,} ({worst.name})",
                      expected=f"autovacuum freezes at {found.freeze_max_age:,}")  # fmt: skip
    for table in [table for table in found.tables if table.temporary and table.oldest > found.freeze_max_age]:
        report.warn(f"temporary table {table.name}", "end its session, or drop it: autovacuum cannot freeze it",
                    value=f"{table.xids:,}")  # fmt: skip
    _tables(report, found, xids, database)


def _status(age: Age, found: Wraparound, xids: Rate) -> Status:
    """Young ones are autovacuum's business, however fast transactions are made: what is past its limit is not."""
    if age.oldest > CRITICAL_AGE:
        return Status.CRITICAL
    late = age.xids > 2 * found.freeze_max_age or age.multixacts > 2 * found.multixact_freeze_max_age
    soon = age.xids > 1.1 * found.freeze_max_age and _left(age, xids) < WEEK
    return Status.WARN if late or soon or age.oldest > WARN_AGE else Status.OK


def _left(age: Age, xids: Rate) -> float:
    """Seconds at the faster of both rates: a few seconds of quiet say nothing of two thousand million transactions."""
    return min(xids.seconds_left(STOP_AGE - age.xids), xids.seconds_left_on_average(STOP_AGE - age.xids))


def _tables(report: Report, found: Wraparound, xids: Rate, database: str) -> None:
    def rows(ages: Sequence[Age]) -> list[tuple[object, ...]]:
        return [
            (a.name, f"{a.xids:,}", f"{a.multixacts:,}", f"{a.oldest / STOP_AGE:.1%}",
             _days(_left(a, xids)), size(a.bytes) if a.bytes else "")
            for a in ages[:MOST_ROWS]
        ]  # fmt: skip

    columns = ("name", "age (transactions)", "age (multixacts)", "of the limit", "left, were nothing frozen", "size")
    report.table("Wraparound: databases", columns, rows(found.databases))
    report.table(f"Wraparound: oldest tables of {database}", columns, rows(found.tables))


def _days(seconds: float) -> str:
    if math.isinf(seconds):
        return "no end (no transactions)"
    days = seconds / 86400
    return f"{days / 365:,.0f} years" if days > 3650 else f"{days:,.0f} days" if days >= 2 else duration(seconds)
