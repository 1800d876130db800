"""Indexes: their faults, and rebuilding them online (§1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.database.server.holders import judge_holders, of_database
from flows.database.upkeep.vacuum import judge_space, require_primary
from flows.pinned import pin_database
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, duration, first_of, size
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.sessions.holders import find_holders
from tasks.postgres.upkeep.foreign_keys import ForeignKey, find_missing
from tasks.postgres.upkeep.indexes import Index, IndexStatistics, find_duplicates, read_indexes, read_statistics
from tasks.postgres.upkeep.reindex import Rebuilt, drop_leftover, rebuild_in_turn
from tasks.postgres.upkeep.session import LOCK_SECONDS, MOST_SHOWN, read_space, resolve

LONG_SECONDS = 60
SPACE_RATIO = 2
BUILD_BYTES_PER_SECOND = 20_000_000


@flow(name="check-indexes", flow_run_name=RunName("check-indexes {environment} {days}d"))
def check_indexes(environment: str, days: Annotated[int, Field(ge=0, le=365)] = 30) -> Report:
    """インデックス状態確認 (§1.4)

    Lists the application's indexes by size, with their use and estimated bloat. Finds invalid, duplicate and unused
    indexes, and foreign keys without an index. Run it monthly, and when writes or queries slow down.

    It reads only and drops nothing: each finding has its statement. Bloat is estimated from the planner's statistics:
    check it before you rebuild. Evidence: the tables.

    Departs from the manual: its columns `tablename` and `indexname` do not exist, and idx_scan = 0 alone does not prove
    that an index is unused. Primary, unique, constraint, replica identity and partition indexes work without scans, and
    counters younger than `days` prove nothing.

    Args:
        environment: Environment (lab, staging, production …)
        days: Do not call an index unused while its statistics are younger than this many days
    """
    env = Environment.find(environment)
    with runbook("Check indexes", env) as report:
        indexes = read_indexes(env.postgres)
        judge_invalid(report, indexes)
        judge_duplicates(report, indexes)
        judge_unused(report, indexes, read_statistics(env.postgres), days)
        judge_missing(report, find_missing(env.postgres))
        judge_bloat(report, indexes)
        show_all(report, indexes)
        report.outcome = f"{len(indexes)} indexes, {size(sum(index.bytes for index in indexes))}"
    return report


@flow(name="rebuild-indexes", flow_run_name=RunName("rebuild-indexes {environment} {indexes} {tables}"))
def rebuild_indexes(
    environment: str,
    indexes: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    tables: list[str] = [],  # noqa: B006
    everything: bool = False,
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    lock_seconds: Annotated[int, Field(ge=1, le=600)] = LOCK_SECONDS,
    long_seconds: Annotated[int, Field(ge=0, le=86400)] = LONG_SECONDS,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """インデックス再構築 (§1.4)

    Rebuilds chosen indexes, all indexes of chosen tables, or all indexes, without blocking reads or writes (REINDEX
    CONCURRENTLY), several tables at a time. It also drops the leftovers of failed rebuilds (`_ccnew`, `_ccold`);
    without a choice only those. Run it for invalid or bloated indexes from check-indexes, and with `everything` in a
    maintenance window.

    It skips tables where another session builds an index. It does not start while a long transaction is open, and names
    it: the rebuild would wait for its end. There is nothing to undo. Evidence: each index's size before and after.

    Departs from the manual: the whole database is rebuilt concurrently too, index by index. A rebuild gives up a lock
    after `lock_seconds` (three times) and drops its leftover.

    Args:
        environment: Environment (lab, staging, production …)
        indexes: Indexes to rebuild (schema.index). Empty: use tables or everything
        tables: Rebuild all indexes of these tables (schema.table). Empty: use indexes
        everything: Rebuild the whole database's indexes (in a maintenance window)
        jobs: Tables to process at a time. 0: number of CPUs
        lock_seconds: Longest wait for a lock, in seconds
        long_seconds: Do not begin while a transaction has been open longer than this, in seconds
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Rebuild indexes", env, confirm, plan, changes=True) as report:
        require_primary(env)
        lanes = check_jobs(jobs)
        known = read_indexes(env.postgres)
        leftovers = [index for index in known if index.is_leftover]
        chosen = _without_building(report, _choose(known, indexes, tables, everything=everything))
        if not chosen and not leftovers:
            report.outcome = "nothing to do"
            return report
        leftover = f", drops {counted(len(leftovers), 'leftover')}" if leftovers else ""
        effect = Effect(f"rebuilds {counted(len(chosen), 'index', 'indexes')} alongside{leftover}", "not needed")
        needs = [lambda report: _judge_start(report, env, chosen, lanes, long_seconds)]
        drops = [
            Change(
                drop_leftover.bind(env.postgres, index, lock_seconds),
                "drop leftover",
                f"{index.name} of {index.table}, concurrently",
                size=index.bytes,
                needs=needs,
            )
            for index in leftovers
        ]
        rebuilds = [_rebuilding(env, chosen, lanes, lock_seconds, needs)] if chosen else []
        pins = [lambda report: pin_database(report, env.postgres)]
        with carrying_out(report, *drops, *rebuilds, effect=effect, pins=pins) as carry:
            for index, drop in zip(leftovers, drops, strict=True):
                reason = carry(drop)
                hint = "run this again when that session has ended"
                report.prefer(f"leftover {index.name}", not reason, hint, value=reason or "dropped")
            done = [one for rebuild in rebuilds for one in carry(rebuild)]
        _report_results(report, done, len(leftovers))
    return report


def _rebuilding(
    env: Environment,
    chosen: tuple[Index, ...],
    lanes: int,
    lock_seconds: int,
    needs: Sequence[Callable[[Report], object]],
) -> Change[[], list[Rebuilt]]:
    """Several tables at a time, the largest first; a table's indexes one by one, because their locks conflict."""
    tables: dict[str, list[Index]] = {}
    for index in chosen:
        tables.setdefault(index.table, []).append(index)
    queues: list[list[Index]] = [[] for _ in range(min(lanes, len(tables)))]
    for indexes in sorted(tables.values(), key=lambda some: -sum(index.bytes for index in some)):
        min(queues, key=lambda queue: sum(index.bytes for index in queue)).extend(indexes)
    rebuilds = [rebuild_in_turn.bind(env.postgres, queue, lock_seconds) for queue in queues]

    def rebuild() -> list[Rebuilt]:
        pending = [one.submit() for one in rebuilds]
        done = {one.name: one for lane in pending for one in lane.result()}
        return [done[index.name] for index in chosen]

    first, *others = map(_planned, chosen)
    return Change(
        rebuild,
        first.step,
        first.detail,
        size=first.bytes,
        seconds=first.seconds,
        more=others,
        by=rebuilds,
        needs=needs,
        begun=State(
            "every valid index is still valid; an interrupted rebuild may have left an invalid one next to it",
            "run this again: it drops the leftovers and rebuilds the rest",
        ),
        done=State("each index is rebuilt, or the report says why not", "run this again for the others"),
    )


def _planned(index: Index) -> PlannedStep:
    state = "" if index.valid else ", which is invalid"
    seconds = max(0.1, index.bytes / BUILD_BYTES_PER_SECOND)
    return PlannedStep("rebuild", f"{index.name} of {index.table}{state}", index.bytes, seconds)


def _choose(known: tuple[Index, ...], indexes: list[str], tables: list[str], *, everything: bool) -> tuple[Index, ...]:
    """The indexes to rebuild, without leftovers and exclusion constraints: those cannot be rebuilt concurrently."""
    able = [index for index in known if not (index.exclusion or index.is_leftover or index.schema == "pg_toast")]
    if everything:
        return tuple(able)
    by_name = {index.name: index for index in known}
    named = resolve(indexes, [(i.name, i.schema, i.relation) for i in known], "index")
    if unable := [name for name in named if by_name[name] not in able]:
        raise OpsError(
            f"{unable[0]} cannot be rebuilt concurrently",
            "leave out leftovers, which are dropped anyway; REINDEX an exclusion constraint in a maintenance window",
        )
    on_tables = {(i.table, i.table_schema, i.table_relation) for i in able}
    of_tables = set(resolve(tables, sorted(on_tables), "table with indexes"))
    return tuple(index for index in able if index.name in named or index.table in of_tables)


def _without_building(report: Report, chosen: tuple[Index, ...]) -> tuple[Index, ...]:
    for table in sorted({index.table for index in chosen if index.building}):
        hint = "run this again when that build is done"
        report.warn(f"indexes of {table}", hint, value="skipped: another session builds one")
    return tuple(index for index in chosen if not index.building)


def _judge_start(report: Report, env: Environment, chosen: tuple[Index, ...], lanes: int, long_seconds: int) -> None:
    """The transactions that a rebuild would wait for, and the free disk space."""
    waited_for = tuple(
        holder
        for holder in of_database(find_holders(env.postgres), env.postgres.database, long_seconds)
        if holder.kind in ("transaction", "prepared transaction") and not holder.builds_index
    )
    judge_holders(report, waited_for, what="a rebuild would wait for", otherwise=Status.CRITICAL)
    if chosen:
        data = env.postgres.data_directory
        needed = {tablespace or data: most for tablespace, most in _needed_bytes(chosen, lanes).items()}
        needed.setdefault(data, max(needed.values()))  # sort files and WAL go there, wherever the index is
        for space in read_space(env.postgres, list(needed)):
            judge_space(report, space.path, space.free_bytes, needed[space.path])


def _needed_bytes(chosen: tuple[Index, ...], lanes: int) -> dict[str, int]:
    """By tablespace: twice (the manual's rule) the largest indexes that are built at once, one of each table."""
    biggest: dict[str, dict[str, int]] = {}
    for index in chosen:
        tables = biggest.setdefault(index.tablespace, {})
        tables[index.table] = max(tables.get(index.table, 0), index.bytes)
    return {space: SPACE_RATIO * sum(sorted(tables.values())[-lanes:]) for space, tables in biggest.items()}


def _report_results(report: Report, done: list[Rebuilt], leftovers: int) -> None:
    for one in (one for one in done if one.failed):
        report.fail(f"index {one.name}", one.hint, value=one.failed)
    rows = [
        (one.name, f"{size(one.before_bytes)} → {size(one.after_bytes)}", f"{one.seconds:.1f}", one.attempts)
        for one in done
    ]
    report.table("Rebuilt", ("index", "size", "seconds", "attempts"), rows, most=MOST_SHOWN)
    rebuilt = [one for one in done if not one.failed]
    freed = sum(one.before_bytes - one.after_bytes for one in rebuilt)
    report.fact("returned to the disk", size(max(freed, 0)))
    report.outcome = f"{len(rebuilt)} of {len(done)} indexes rebuilt, {leftovers} leftovers handled"


BLOATED_RATIO, BLOATED_BYTES = 0.5, 10_000_000
DAY_SECONDS = 86400

_COLUMNS = ("index", "table", "size", "bloat (estimate)", "scans", "last scan", "rows read", "rows fetched", "kind")


def show_all(report: Report, indexes: tuple[Index, ...]) -> None:
    """A table of all indexes, largest first."""
    report.table("Indexes", _COLUMNS, [_row(index) for index in indexes], most=MOST_SHOWN)


def _row(index: Index) -> tuple[object, ...]:
    kind = "primary" if index.primary else "unique" if index.unique else index.method
    bloat = "not measured" if index.estimated_bytes < 0 else f"{index.bloat_ratio:.0%}"
    read = (f"{index.scans:,}", index.last_scan, f"{index.tuples_read:,}", f"{index.tuples_fetched:,}")
    state = "" if index.valid else ", being built" if index.building else ", INVALID"
    return (index.name, index.table, size(index.bytes), bloat, *read, kind + state)


def _names(indexes: Sequence[Index]) -> str:
    return first_of([index.name for index in indexes], 5)


def judge_invalid(report: Report, indexes: tuple[Index, ...]) -> None:
    """Invalid indexes: writes maintain them, queries never use them."""
    leftovers = [index for index in indexes if index.is_leftover]
    report.prefer(
        "leftovers of rebuilds",
        not leftovers,
        "run rebuild-indexes without a choice, which drops them",
        value=_names(leftovers) or "none",
        expected="none",
        follow=[Next("rebuild-indexes", "drop them")],
    )
    broken = [index for index in indexes if index.is_broken and not index.is_leftover]
    report.prefer(
        "invalid indexes",
        not broken,
        "run rebuild-indexes with them, or DROP INDEX CONCURRENTLY",
        value=_names(broken) or "none",
        expected="none",
        follow=[Next("rebuild-indexes", "rebuild them", {"indexes": [index.name for index in broken]})],
    )
    if live := [index for index in indexes if not index.valid and index.building]:
        report.fact("being built now", _names(live))


def judge_duplicates(report: Report, indexes: tuple[Index, ...]) -> None:
    """Indexes that another one makes redundant, and the statements that drop them."""
    found = find_duplicates(indexes)
    wasted = sum(other.bytes for _, other in found)
    report.prefer(
        "duplicate indexes",
        not found,
        "drop them with the statements in the table Duplicates",
        value=f"{_names([other for _, other in found])} ({size(wasted)})" if found else "none",
        expected="none",
    )
    if found:
        rows = [(kept.name, other.name, size(other.bytes), _drop_text(other)) for kept, other in found]
        report.table("Duplicates", ("keep", "redundant", "size", "statement"), rows, most=MOST_SHOWN)


def _drop_text(index: Index) -> str:
    return f"DROP INDEX CONCURRENTLY {index.name};"


def judge_unused(report: Report, indexes: tuple[Index, ...], statistics: IndexStatistics, days: int) -> None:
    """Indexes without a scan; not measured while the counters are younger than `days`."""
    report.fact("scans counted since", f"{statistics.since} UTC ({duration(statistics.seconds)})")
    unused = [index for index in indexes if index.scans == 0 and index.valid and not index.is_needed_unused]
    rows = [(index.name, index.table, size(index.bytes), _drop_text(index)) for index in unused]
    if statistics.seconds < days * DAY_SECONDS:
        value = f"not measured: scans are counted since {statistics.since} UTC only"
        report.warn("unused indexes", f"check again after {days} days; drop none before", value=value)
        rows = [(*row[:3], "not yet") for row in rows]
    else:
        standbys = f"; check the {statistics.standbys} standbys first: they count separately" * bool(
            statistics.standbys
        )
        report.prefer(
            "unused indexes",
            not unused,
            f"drop those in the table Never scanned that no rare job needs{standbys}",
            value=f"{_names(unused)} ({size(sum(index.bytes for index in unused))})" if unused else "none",
            expected="none",
        )
    if rows:
        name = f"Never scanned since {statistics.since} UTC"
        report.table(name, ("index", "table", "size", "statement"), rows, most=MOST_SHOWN)


def judge_missing(report: Report, missing: tuple[ForeignKey, ...]) -> None:
    """Foreign keys without an index: a deletion in the referenced table reads the whole referencing one."""
    report.prefer(
        "foreign keys without an index",
        not missing,
        "create the index (see the table) if rows of the referenced table are ever deleted: each deletion reads all of "
        "the referencing table",
        value=", ".join(f"{key.table} ({key.constraint})" for key in missing[:5]) or "none",
        expected="none",
    )
    if missing:
        columns = ("table", "constraint", "refers to", "rows", "size", "statement")
        rows = [(k.table, k.constraint, k.referenced, f"{k.rows:,}", size(k.bytes), f"{k.create};") for k in missing]
        report.table("Foreign keys without an index", columns, rows, most=MOST_SHOWN)


def judge_bloat(report: Report, indexes: tuple[Index, ...]) -> None:
    """Large indexes with much bloat, by estimate."""
    bloated = [i for i in indexes if i.valid and i.bloat_ratio >= BLOATED_RATIO and i.bytes >= BLOATED_BYTES]
    report.prefer(
        "bloat (estimate)",
        not bloated,
        "ANALYZE, check again, then run rebuild-indexes",
        value=", ".join(f"{i.name}: {i.bloat_ratio:.0%} of {size(i.bytes)}" for i in bloated[:5]) or "none",
        expected=f"below {BLOATED_RATIO:.0%}, or smaller than {size(BLOATED_BYTES)}",
        follow=[Next("rebuild-indexes", "rebuild them", {"indexes": [index.name for index in bloated]})],
    )
