"""What check-indexes says of what it read (§1.4)."""

from __future__ import annotations

from collections.abc import Sequence

from runbook.render import duration, size
from runbook.report import Report, Status
from tasks.postgres.foreign_keys import ForeignKey
from tasks.postgres.indexes import Index, Statistics, find_duplicates
from tasks.postgres.upkeep import MOST_SHOWN

BLOATED_RATIO, BLOATED_BYTES = 0.5, 10_000_000
DAY_SECONDS = 86400

_COLUMNS = ("index", "table", "size", "bloat (estimate)", "scans", "last scan", "rows read", "rows fetched", "kind")


def show_all(report: Report, indexes: tuple[Index, ...]) -> None:
    """All of them, biggest first."""
    show(report, "Indexes", _COLUMNS, [_row(index) for index in indexes])


def _row(index: Index) -> tuple[object, ...]:
    kind = "primary" if index.primary else "unique" if index.unique else index.method
    bloat = "not measured" if index.estimated_bytes < 0 else f"{index.bloat_ratio:.0%}"
    read = (f"{index.scans:,}", index.last_scan, f"{index.tuples_read:,}", f"{index.tuples_fetched:,}")
    state = "" if index.valid else ", being built" if index.building else ", INVALID"
    return (index.name, index.table, size(index.bytes), bloat, *read, kind + state)


def show(report: Report, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of its first rows."""
    more = f" (the first {MOST_SHOWN} of {len(rows)})" if len(rows) > MOST_SHOWN else ""
    report.table(name + more, columns, rows[:MOST_SHOWN])


def _names(indexes: Sequence[Index]) -> str:
    more = f" and {len(indexes) - 5} more" if len(indexes) > 5 else ""
    return ", ".join(index.name for index in indexes[:5]) + more


def judge_invalid(report: Report, indexes: tuple[Index, ...]) -> None:
    """An invalid index is written to and never read: it only costs."""
    leftovers = [index for index in indexes if index.is_leftover]
    report.expect(
        "leftovers of rebuilds",
        not leftovers,
        "rebuild-indexes without any choice drops them",
        value=_names(leftovers) or "none",
        expected="none",
        otherwise=Status.WARN,
    )
    broken = [index for index in indexes if index.is_broken and not index.is_leftover]
    report.expect(
        "invalid indexes",
        not broken,
        f"rebuild-indexes with indexes={[index.name for index in broken[:5]]}; or DROP INDEX CONCURRENTLY them",
        value=_names(broken) or "none",
        expected="none",
        otherwise=Status.WARN,
    )
    if live := [index for index in indexes if not index.valid and index.building]:
        report.fact("being built now", _names(live))


def judge_duplicates(report: Report, indexes: tuple[Index, ...]) -> None:
    """Those that add nothing to another one, and the statements that drop them."""
    found = find_duplicates(indexes)
    wasted = sum(other.bytes for _, other in found)
    report.expect(
        "duplicate indexes",
        not found,
        "see the table Duplicates: the statement drops the one that adds nothing",
        value=f"{_names([other for _, other in found])} ({size(wasted)})" if found else "none",
        expected="none",
        otherwise=Status.WARN,
    )
    if found:
        rows = [(kept.name, other.name, size(other.bytes), _drop_text(other)) for kept, other in found]
        show(report, "Duplicates", ("keep", "adds nothing", "size", "statement"), rows)


def _drop_text(index: Index) -> str:
    return f"DROP INDEX CONCURRENTLY {index.name};"


def judge_unused(report: Report, indexes: tuple[Index, ...], statistics: Statistics, days: int) -> None:
    """Those that nobody scanned for long; “not measured” where the counters are young."""
    report.fact("scans counted since", f"{statistics.since} UTC ({duration(statistics.seconds)})")
    unused = [index for index in indexes if index.scans == 0 and index.valid and not index.is_needed_unused]
    rows = [(index.name, index.table, size(index.bytes), _drop_text(index)) for index in unused]
    if statistics.seconds < days * DAY_SECONDS:
        value = f"not measured: scans are counted since {statistics.since} UTC only"
        report.warn("unused indexes", f"look again after {days} days; drop none before", value=value)
        rows = [(*row[:3], "not yet") for row in rows]
    else:
        standbys = f"; {statistics.standbys} standbys count their own scans: ask them first" * bool(statistics.standbys)
        report.expect(
            "unused indexes",
            not unused,
            f"see the table Never scanned: drop what nobody misses{standbys}",
            value=f"{_names(unused)} ({size(sum(index.bytes for index in unused))})" if unused else "none",
            expected="none",
            otherwise=Status.WARN,
        )
    if rows:
        show(report, f"Never scanned since {statistics.since} UTC", ("index", "table", "size", "statement"), rows)


def judge_missing(report: Report, missing: tuple[ForeignKey, ...]) -> None:
    """Foreign keys whose deletions read a whole table."""
    report.expect(
        "foreign keys without an index",
        not missing,
        "see the table: a deletion above reads the whole table; create the index where rows are ever deleted there",
        value=", ".join(f"{key.table} ({key.constraint})" for key in missing[:5]) or "none",
        expected="none",
        otherwise=Status.WARN,
    )
    if missing:
        columns = ("table", "constraint", "refers to", "rows", "size", "statement")
        rows = [(k.table, k.constraint, k.referenced, f"{k.rows:,}", size(k.bytes), f"{k.create};") for k in missing]
        show(report, "Foreign keys without an index", columns, rows)


def judge_bloat(report: Report, indexes: tuple[Index, ...]) -> None:
    """Big indexes that are mostly air, by estimate."""
    bloated = [i for i in indexes if i.valid and i.bloat_ratio >= BLOATED_RATIO and i.bytes >= BLOATED_BYTES]
    report.expect(
        "bloat (estimate)",
        not bloated,
        f"ANALYZE, look again; then rebuild-indexes with indexes={[index.name for index in bloated[:5]]}",
        value=", ".join(f"{i.name}: {i.bloat_ratio:.0%} of {size(i.bytes)}" for i in bloated[:5]) or "none",
        expected=f"below {BLOATED_RATIO:.0%}, or smaller than {size(BLOATED_BYTES)}",
        otherwise=Status.WARN,
    )
