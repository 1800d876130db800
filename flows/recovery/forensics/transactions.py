"""find-transaction (§8.4): which transaction deleted, updated, truncated or dropped a table, read from WAL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.recovery.forensics import table_files, wal_window
from flows.recovery.forensics.table_files import BY_OID, TableFiles, Tables
from flows.recovery.forensics.wal_window import Window, read_window
from runbook import clock
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.page.form import read_forms
from runbook.page.markdown import escaped
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.wal.branch import number_in_use
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.supply import read_supply
from tasks.wal.reading.touches import TOUCHING, Touches
from tasks.wal.reading.transactions import DEFINING, Definitions, End, Kind, Pair

EVERY: list[Kind] = ["DELETE", "UPDATE", "TRUNCATE", "DROP"]
MOST_LINKS = 20
MOST_OPEN = 10
COLUMNS = (
    *("committed", "transaction", "LSN of the commit", "what"),
    *("rows deleted", "rows updated", "TOAST rows", "table"),
)


@flow(name="find-transaction", flow_run_name=RunName("find-transaction {environment} {table}"))
def find_transaction(
    environment: str,
    table: str = "",
    since: str = "",
    until: str = "",
    kinds: list[Literal["DELETE", "UPDATE", "TRUNCATE", "DROP"]] = EVERY,
    at_least: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1,
    timeline: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    source: Stores = "backups",
) -> Report:
    """破壊トランザクションの特定 (§8.4)

    Finds the transactions that deleted, updated, truncated or dropped a table. Run it when rows are missing or wrong
    and nobody knows since when. The report lists each transaction by time: number, commit time, LSN and rows. For the
    largest it has a form of restore-to-point that stops just before the transaction.

    It only reads: WAL from the archive, the receiver's directory and pg_wal. Earlier files of a table that was
    truncated, rewritten (VACUUM FULL) or dropped are found in WAL. The name of a dropped table is looked up in
    databases that restores kept, on the standby and in the newest base backup. If none of them has it, the report lists
    the OIDs of dropped tables: set table to one of them. Changes in a database that a restore has replaced are marked.

    Duration: each segment (16 MB) is read up to three times; progress is in the log.
    Evidence: the transactions, the WAL that was read, and gaps in it.

    Departs from the manual: it restores to a point in time, but has no way to find that point.

    Args:
        environment: Environment (lab, staging, production …)
        table: Table (schema.table; required). Of a partition the parent; of a dropped table with an unknown name the
            OID
        since: Start of the search: a time (e.g. 2026-02-15 03:00 or 2026-02-15 03:00+09:00; without a zone: the
            environment's) or an LSN. Empty: 24 hours before the end
        until: End of the search: a time (e.g. 2026-02-15 04:00; without a zone: the environment's) or an LSN. Empty:
            until now
        kinds: Kinds of operation to find
        at_least: Show only transactions that changed at least this many rows (TRUNCATE and DROP are always shown)
        timeline: Timeline to follow. 0: the one in use
        source: Store of the WAL archive. copies: the replica store
    """
    env = Environment.find(environment)
    with runbook("Find transaction", env) as report, wal_window.scratch_directory(env) as directory:
        typed = table.strip()
        if not typed:
            raise OpsError("table is empty", "set table to a name, e.g. public.orders")
        if not kinds:
            raise OpsError("kinds is empty", f"choose some of {', '.join(EVERY)}")
        edges = wal_window.parse_edges(since, until, env)
        system = wal_window.find_system(env, source)
        supply = read_supply(env, source, system, timeline or number_in_use(env, source, system))
        window = wal_window.choose_window(env, supply, edges, directory)
        wal_window.report_window(report, window)
        tables = table_files.find_tables(report, env, typed, source)
        definitions = Definitions(tables.databases, tables.swap)
        read_window(env, window, DEFINING, definitions.read, "dropped and rewritten tables")
        if since.strip():
            wal_window.judge_begin(report, window, definitions.first)
        table_files.find_older(report, env, tables, definitions, source)
        if tables.databases - definitions.databases:  # of before a restore: its changes are read too
            definitions = Definitions(tables.databases, tables.swap)
            read_window(env, window, DEFINING, definitions.read, "the database of before the restore")
        files = table_files.trace_files(tables, definitions)
        touches = Touches(frozenset(files.names), at_least)
        rows = [kind for kind in kinds if kind in ("DELETE", "UPDATE")]
        if rows and files.names:
            read_window(env, window, TOUCHING, lambda lines: touches.read(lines, rows), "rows of the table")
        report_results(report, env, Search(typed, kinds, window, tables, definitions, files, touches))
    return report


@dataclass(frozen=True)
class Search:
    """Everything that was read."""

    table: str
    kinds: Sequence[str]
    window: Window
    tables: Tables
    definitions: Definitions
    files: TableFiles
    touches: Touches


@dataclass(frozen=True)
class TableChange:
    """One committed transaction: what it did to whole tables ("" for nothing), the rows that it touched, and the OID of
    its database. `before_swap`: committed in the live database before the last swap, probably by the restore."""

    end: End
    whole: str
    deleted: int
    updated: int
    toast: int
    tables: str
    database: int
    before_swap: bool = False

    @property
    def rows(self) -> int:
        """Rows deleted and updated."""
        return self.deleted + self.updated

    @property
    def text(self) -> str:
        """`DELETE 120, UPDATE 3`."""
        rows = ((self.deleted, "DELETE"), (self.updated, "UPDATE"))
        return ", ".join(filter(None, [self.whole, *(f"{kind} {count:,}" for count, kind in rows if count)]))

    @property
    def row(self) -> tuple[object, ...]:
        """As `COLUMNS`."""
        when, lsn = clock.text(self.end.at, "microseconds"), lsn_text(self.end.lsn)
        return (when, self.end.xid, lsn, self.text, self.deleted, self.updated, self.toast, self.tables)


def report_results(report: Report, env: Environment, search: Search) -> None:
    """The transactions with their forms, and every limit of this answer."""
    changes = changes_in(search)
    report.table("Transactions, by time", COLUMNS, [one.row for one in changes])
    if changes:
        report.attach(Evidence("Go back", text=_forms(env, search, changes)))
    places = [(one.name, one.where, one.oid, one.file) for one in search.tables.found]
    report.table("Where the table was found", ("table", "in", "OID", "file"), places)
    _judge_table(report, search)
    _judge_databases(report, search, changes)
    wal_window.judge_gaps(report, search.window, found=bool(changes))
    _judge_unfinished(report, search)
    _summarise(report, search, changes)


def changes_in(search: Search) -> list[TableChange]:
    """Those within the window, by commit time."""
    wanted, found = set(search.kinds), dict[int, TableChange]()
    for touched in search.touches.found:
        touched_files = (*touched.deleted, *touched.updated)
        toast = {file for file in touched_files if file in search.files.toast}
        deleted, updated = (_sum(rows, toast) for rows in (touched.deleted, touched.updated))
        names = {search.files.names[file] for file in touched_files} - {"TOAST"}
        in_toast = touched.rows - deleted - updated
        database = touched_files[0][0]  # a transaction is in one database only
        found[touched.end.lsn] = TableChange(
            touched.end, "", deleted, updated, in_toast, ", ".join(sorted(names)), database
        )
    for definition, what, name, database in search.files.events:
        if what in wanted:
            old = found.get(definition.end.lsn, TableChange(definition.end, "", 0, 0, 0, "", database))
            whole, names = {*old.whole.split(" + "), what} - {""}, {*old.tables.split(", "), name} - {""}
            found[old.end.lsn] = replace(old, whole=" + ".join(sorted(whole)), tables=", ".join(sorted(names)))
    inside = [_marked(search, one) for one in found.values() if search.window.holds(one.end)]
    return sorted(inside, key=lambda one: (one.end.at, one.end.lsn))


def _marked(search: Search, change: TableChange) -> TableChange:
    """What a restore did to its copy (it truncates what it fills) was not done to the live database."""
    live, definitions = search.tables.database, search.definitions
    if change.database != live or live not in definitions.databases_made or change.end.lsn > definitions.swapped:
        return change
    return replace(change, tables=f"{change.tables} before the last swap", before_swap=True)


def _sum(rows: Mapping[Pair, int], toast: set[Pair]) -> int:
    return sum(count for file, count in rows.items() if file not in toast)


def _forms(env: Environment, search: Search, changes: Sequence[TableChange]) -> str:
    """restore-to-point just before the largest transactions, by time."""
    chosen = sorted(changes, key=lambda one: (one.before_swap, not one.whole, -one.rows))[:MOST_LINKS]
    lines, forms = [], read_forms([env.name])
    for change in sorted(chosen, key=lambda one: one.end.lsn):
        target = {
            "environment": env.name,
            "by": "before_transaction",
            "target": str(change.end.xid),
            "timeline": search.window.supply.timeline.number,
        }
        options = [f"the whole cluster, just before it: {forms.link('restore-to-point', env.name, target)}"]
        if not search.table.isdecimal() and "DROP" not in change.whole:
            only = {**target, "mode": "tables", "tables": [search.table]}
            options.append(f"{escaped(search.table)} only: {forms.link('restore-to-point', env.name, only)}")
        what = f"transaction {change.end.xid} ({clock.text(change.end.at)}, {escaped(change.text)})"
        lines.append(f"- {what}: {'; '.join(options)}")
    if len(changes) > len(chosen):
        lines.append(
            f"- {len(changes) - len(chosen)} smaller transactions: use by=before_transaction with their number"
        )
    return "\n".join(lines)


def _judge_table(report: Report, search: Search) -> None:
    """If no catalog has the name, the report lists dropped tables by OID."""
    found = sorted({one.where for one in search.tables.found})
    dropped = [
        (clock.text(one.end.at), one.end.xid, ", ".join(str(oid) for _, oid in sorted(one.end.dropped)))
        for one in search.definitions.found
        if one.end.files and one.end.dropped - one.transient and search.window.holds(one.end)
    ]
    if dropped and not found:
        columns = ("committed", "transaction", "OIDs")
        report.table("Dropped in the window (tables, indexes, TOAST)", columns, dropped)
    by_oid = f"; if the table was dropped, {BY_OID} (the lowest OID of its transaction)" if dropped else ""
    report.require(
        f"table {search.table} is known",
        bool(found),
        f"check its spelling{by_oid}",
        value=", ".join(found) or search.tables.unknown,
    )


def _judge_databases(report: Report, search: Search, changes: Sequence[TableChange]) -> None:
    """A restore gives the live database's name to another database: in which one a transaction was committed."""
    tables, live = search.tables, search.tables.database
    others = [one for one in changes if live and one.database != live]
    if others:
        places = sorted({tables.place(one.database) for one in others})
        report.warn(
            "changes in a database that is not live",
            "it was live until a restore replaced it: undo-restore makes it live again; salvage-writes copies rows "
            "that only it has",
            value=f"{len(others)} of {len(changes)} transactions: {', '.join(places)}",
            follow=[Next("salvage-writes", "compare the replaced database with the live one")],
        )
    elif (made := search.definitions.databases_made.get(live)) and tables.databases <= {live}:
        report.warn(
            "the live database is younger than the window",
            "search the replica store for an older base backup (source=copies), or set since to a later time",
            value=f"created at LSN {lsn_text(made)}; no catalog has the tables of the database before it",
        )


def _judge_unfinished(report: Report, search: Search) -> None:
    """Transactions that are not, or not completely, in the window."""
    touches, window = search.touches, search.window
    if touches.left_out:
        report.fact("not shown", f"{touches.left_out} transactions with fewer rows (at_least)")
    unfinished = sorted(touches.open.items(), key=lambda item: -item[1])[:MOST_OPEN]
    if unfinished:
        report.warn(
            "transactions without an end in the window",
            "check pg_stat_activity and pg_prepared_xacts for open ones, or set until to a later time",
            value=", ".join(f"{xid} ({rows:,} rows)" for xid, rows in unfinished),
        )
    if earlier := [str(end.xid) for end in search.definitions.begun if window.holds(end)]:
        report.warn(
            "transactions that began before the window",
            "set since to an earlier time to count all of their rows",
            value=f"{', '.join(earlier[:MOST_OPEN])}: rows before LSN {window.first_lsn} are not counted",
        )


def _summarise(report: Report, search: Search, changes: Sequence[TableChange]) -> None:
    commits, first, last = search.definitions.commits, search.definitions.first, search.definitions.last
    report.fact("commits in the WAL that was read", f"{commits:,}")
    if first and last:
        report.fact("from", f"{clock.text(first.at)} to {clock.text(last.at)}")
    if not changes:
        report.outcome = f"none of {commits:,} transactions changed {search.table} in that way"
        return
    live = [one for one in changes if not one.before_swap]
    whole = [one for one in live if one.whole]
    main = max(whole or live or changes, key=lambda one: one.rows)
    when = f"{clock.text(main.end.at, 'microseconds')} at {lsn_text(main.end.lsn)}"
    many = f"{len(changes)} of {commits:,} transactions"
    report.outcome = f"{many}; the largest is {main.end.xid} ({main.text}), committed {when}"
