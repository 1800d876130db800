"""What find-transaction found, told so that the next runbook can be launched from it, called with the open report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from flows.recovery.forensics.transaction_window import Window, judge_window
from flows.store import read_files, store_for
from runbook.errors import OpsError, VerificationFailed
from runbook.page.form import read_forms
from runbook.page.markdown import escaped
from runbook.report import Evidence, Report
from tasks.backups.catalogue import open_all
from tasks.cluster.catalog import find_in_backup
from tasks.cluster.content import cluster_in
from tasks.postgres.restore.superseded import find_superseded, read_swap
from tasks.postgres.tables.filenodes import Filed, find_filed, read_database_oid
from tasks.wal.format.names import lsn_text
from tasks.wal.reading.touches import Touches
from tasks.wal.reading.transactions import Definition, Definitions, End, Pair, trace

MOST_LINKS = 20
MOST_OPEN = 10
COLUMNS = (
    *("committed (UTC)", "transaction", "LSN of the commit", "what"),
    *("rows deleted", "rows updated", "TOAST rows", "table"),
)


@dataclass(frozen=True)
class Account:
    """Everything that was read."""

    table: str
    kinds: Sequence[str]
    window: Window
    tables: Tables
    definitions: Definitions
    files: Files
    touches: Touches


@dataclass(frozen=True)
class Deed:
    """One committed transaction: what it did to whole tables ("" where nothing), the rows that it touched, and the
    OID of its database. `early`: it was done in the live database before the last swap, by the restore most likely."""

    end: End
    whole: str
    deleted: int
    updated: int
    toast: int
    tables: str
    database: int
    early: bool = False

    @property
    def told(self) -> str:
        """`DELETE 120, UPDATE 3`."""
        rows = ((self.deleted, "DELETE"), (self.updated, "UPDATE"))
        return ", ".join(filter(None, [self.whole, *(f"{kind} {count:,}" for count, kind in rows if count)]))


def report_results(report: Report, env: Environment, account: Account) -> None:
    """The table of transactions, the links, and everything that makes it less than the whole truth."""
    deeds = deeds_of(account)
    report.table("Transactions, by time", COLUMNS, [_row(deed) for deed in deeds])
    if deeds:
        report.attach(Evidence("Go back", text=_links(env, account, deeds)))
    _tell_rewrites(report, account)
    _judge_known(report, account)
    _tell_databases(report, account, deeds)
    judge_window(report, account.window, found=bool(deeds))
    _tell_limits(report, account)
    _conclude(report, account, deeds)


def deeds_of(account: Account) -> list[Deed]:
    """Those within the window, by the time of their commit."""
    wanted, found = set(account.kinds), dict[int, Deed]()
    for touched in account.touches.found:
        toast = {file for file in (*touched.deleted, *touched.updated) if file in account.files.toast}
        deleted, updated = (_sum(rows, toast) for rows in (touched.deleted, touched.updated))
        names = {account.files.names[file] for file in (*touched.deleted, *touched.updated)} - {"TOAST"}
        in_toast = touched.rows - deleted - updated
        database = next(iter((*touched.deleted, *touched.updated)))[0]  # a transaction is in one only
        found[touched.end.lsn] = Deed(touched.end, "", deleted, updated, in_toast, ", ".join(sorted(names)), database)
    for definition, what, name, database in account.files.events:
        if what in wanted:
            old = found.get(definition.end.lsn, Deed(definition.end, "", 0, 0, 0, "", database))
            whole, names = {*old.whole.split(" + "), what} - {""}, {*old.tables.split(", "), name} - {""}
            found[old.end.lsn] = replace(old, whole=" + ".join(sorted(whole)), tables=", ".join(sorted(names)))
    inside = [_dated(account, deed) for deed in found.values() if account.window.holds(deed.end)]
    return sorted(inside, key=lambda deed: (deed.end.at, deed.end.lsn))


def _dated(account: Account, deed: Deed) -> Deed:
    """What a restore did to its copy (it truncates what it fills) was not done to the live database."""
    live, definitions = account.tables.database, account.definitions
    if deed.database != live or live not in definitions.databases_made or deed.end.lsn > definitions.swapped:
        return deed
    return replace(deed, tables=f"{deed.tables} before the last swap", early=True)


def _sum(rows: dict[Pair, int] | object, toast: set[Pair]) -> int:
    assert isinstance(rows, dict)
    return sum(count for file, count in rows.items() if file not in toast)


def _row(deed: Deed) -> tuple[object, ...]:
    end = deed.end
    return (
        f"{end.at:%Y-%m-%d %H:%M:%S.%f}",
        end.xid,
        lsn_text(end.lsn),
        deed.told,
        deed.deleted,
        deed.updated,
        deed.toast,
        deed.tables,
    )


def _links(env: Environment, account: Account, deeds: Sequence[Deed]) -> str:
    """The largest first picked, told by time."""
    chosen = sorted(deeds, key=lambda deed: (deed.early, not deed.whole, -deed.deleted - deed.updated))[:MOST_LINKS]
    lines, forms = [], read_forms([env.name])
    for deed in sorted(chosen, key=lambda deed: deed.end.lsn):
        target = {
            "environment": env.name,
            "by": "before_transaction",
            "target": str(deed.end.xid),
            "timeline": account.window.supply.timeline.number,
        }
        ways = [f"the whole cluster, just before it: {forms.link('restore-to-point', env.name, target)}"]
        if account.table.strip() and "DROP" not in deed.whole:
            only = {**target, "mode": "tables", "tables": [account.table]}
            ways.append(f"{escaped(account.table)} only: {forms.link('restore-to-point', env.name, only)}")
        lines.append(
            f"- transaction {deed.end.xid} ({deed.end.at:%H:%M:%S} UTC, {escaped(deed.told)}): {'; '.join(ways)}"
        )
    if len(deeds) > len(chosen):
        lines.append(f"- {len(deeds) - len(chosen)} smaller ones: by=before_transaction and their number")
    return "\n".join(lines)


def _tell_rewrites(report: Report, account: Account) -> None:
    rows = [
        (f"{one.end.at:%Y-%m-%d %H:%M:%S.%f}", one.end.xid, name)
        for one, what, name, _ in account.files.events
        if what == "rewrite"
    ]
    if rows:
        report.table(
            "Rewritten whole (VACUUM FULL, CLUSTER, ALTER TABLE): rows stay",
            ("committed (UTC)", "transaction", "table"),
            rows,
        )
    places = [(one.name, one.where, one.oid, one.file) for one in account.tables.found]
    report.table("Where the table was found", ("table", "in", "OID", "file"), places)


def _judge_known(report: Report, account: Account) -> None:
    """A name that nobody knows: what was dropped is told by OID."""
    known = bool(account.tables.found)
    gone = [
        (f"{one.end.at:%Y-%m-%d %H:%M:%S}", one.end.xid, ", ".join(str(oid) for _, oid in sorted(one.end.dropped)))
        for one in account.definitions.found
        if one.end.files and one.end.dropped - one.transient and account.window.holds(one.end)
    ]
    if gone and not known:
        report.table("Dropped in the window (tables, indexes, TOAST)", ("committed (UTC)", "transaction", "OIDs"), gone)
    report.require(
        f"the table {account.table or 'of that OID'} is known",
        known,
        "see its spelling; if it was dropped: launch it again with oid, one of those in the table of what was dropped "
        "(a table's own is the lowest of its transaction)"
        if gone
        else "see its spelling",
        value=account.tables.unknown if not known else ", ".join(sorted({one.where for one in account.tables.found})),
    )


def _tell_databases(report: Report, account: Account, deeds: Sequence[Deed]) -> None:
    """A restore gives the live database's name to another one: what was done in which of them."""
    tables, live = account.tables, account.tables.database
    others = [deed for deed in deeds if live and deed.database != live]
    if others:
        places = sorted({tables.place(deed.database) for deed in others})
        report.warn(
            "rows of a database that is not the live one",
            "it was the live one until it was replaced, or was "
            "written to since: undo-restore brings it back, salvage-writes what only it has",
            value=f"{len(others)} of {len(deeds)} transactions: {', '.join(places)}",
        )
    elif (made := account.definitions.databases_made.get(live)) and tables.databases <= {live}:
        report.warn(
            "the live database was made in the window",
            "what was done before that was done in another one, "
            "which no catalog here knows any more: look in the second store (source=copies) for an older base "
            "backup, or name since after it",
            value=f"at LSN {lsn_text(made)}",
        )


def _tell_limits(report: Report, account: Account) -> None:
    """What is less than the whole truth."""
    touches = account.touches
    if touches.left_out:
        report.fact("not shown", f"{touches.left_out} transactions with fewer rows (at_least)")
    still = sorted(touches.open.items(), key=lambda item: -item[1])[:MOST_OPEN]
    if still:
        report.warn(
            "transactions whose end is not in the window",
            "they are open, or ended behind the window or in a "
            "gap of it: look at pg_stat_activity and pg_prepared_xacts, or set until later",
            value=", ".join(f"{xid} ({rows:,} rows)" for xid, rows in still),
        )
    if begun := [str(end.xid) for end in account.definitions.begun if account.window.holds(end)]:
        first = lsn_text(account.window.numbers[0] * account.window.supply.segment_bytes)
        report.warn(
            "transactions that began before the window",
            "set since earlier to count all of their rows",
            value=f"{', '.join(begun[:MOST_OPEN])}: rows before LSN {first} are not counted",
        )


def _conclude(report: Report, account: Account, deeds: Sequence[Deed]) -> None:
    commits = account.definitions.commits
    report.fact("commits in the WAL that was read", f"{commits:,}")
    if first := account.definitions.first:
        last = account.definitions.last
        report.fact(
            "from", f"{first.at:%Y-%m-%d %H:%M:%S UTC} to {last.at if last else first.at:%Y-%m-%d %H:%M:%S UTC}"
        )
    if not deeds:
        report.outcome = f"none of {commits:,} transactions touched {account.table or 'it'} in that way"
        return
    live = [deed for deed in deeds if not deed.early]
    whole = [deed for deed in live if deed.whole]
    main = max(whole or live or deeds, key=lambda deed: deed.deleted + deed.updated)
    when = f"{main.end.at:%Y-%m-%d %H:%M:%S.%f UTC} at {lsn_text(main.end.lsn)}"
    many = f"{len(deeds)} of {commits:,} transactions"
    report.outcome = f"{many}; the heaviest is {main.end.xid} ({main.told}), committed {when}"


@dataclass
class Tables:
    """What a name may mean, from every catalog that could be asked; `database` is the live one's OID, 0 where the
    server does not answer; `kept` are the databases that restores replaced, `swap` the transaction of the last
    such swap; `unknown` says why the live database has no such table."""

    typed: str
    database: int = 0
    kept: tuple[str, ...] = ()
    swap: int = 0
    found: list[Filed] = field(default_factory=list)
    unknown: str = ""

    @property
    def databases(self) -> frozenset[int]:
        """Their OIDs; none where nothing could be asked."""
        return frozenset({self.database, *(one.database for one in self.found)} - {0})

    def told(self, one: Filed) -> str:
        """A table's name, with its database's where that is not the live one."""
        if one.database == self.database or not self.database:
            return one.name
        return f"{one.name} in {self.place(one.database)}"

    def place(self, database: int) -> str:
        """A database that is not the live one."""
        kept = [one.where for one in self.found if one.database == database and one.where in self.kept]
        return kept[0] if kept else f"a database that had this name before (OID {database})"


@dataclass(frozen=True)
class Files:
    """The files in which the rows of a table are or were, each with its name; those of TOAST tables; and what happened
    to whole tables: the transaction, what, the table, and its database's OID."""

    names: dict[Pair, str]
    toast: frozenset[Pair]
    events: list[tuple[Definition, str, str, int]]


def find_tables(report: Report, env: Environment, typed: str, oid: int, source: Stores) -> Tables:
    """By name in the live database, those that restores kept, and the standby's; where it is not in the live one, in
    the newest base backup. By OID where that is given.

    Raises:
        OpsError: neither a server nor an OID tells anything.
    """
    live = env.postgres
    tables, names = Tables(typed), list[str]()
    if nodes.ask(live):
        tables.database = read_database_oid(live, live.database)
        tables.kept = tuple(old.name for old in find_superseded(live))
        names, tables.swap = [live.database, *tables.kept], read_swap(live)
    else:
        tables.unknown = "the server does not answer"
    asked = [(live, name) for name in names]
    if env.has("standby") and nodes.ask(env.standby):
        asked.append((env.standby, live.database))
    for server, name in asked if typed.strip() else ():
        try:
            found = find_filed(server, name, typed)
        except OpsError as error:
            if (server, name) == (live, live.database):
                tables.unknown = f"{error.message}" + (f" ({error.hint})" if "near it" in error.hint else "")
            continue
        where = name if server is live else f"{name} on the standby"
        tables.found += [replace(one, where=where) for one in found]
    if oid:
        database = tables.database or next((one.database for one in tables.found), 0)
        if not database:
            raise OpsError(
                f"the database of OID {oid} cannot be told: {tables.unknown}",
                "start the server, or the standby, or name the table without its OID",
            )
        tables.found.append(Filed(database, oid, typed or f"OID {oid}", oid, 0, "the form"))
    elif not any(one.where == live.database for one in tables.found):
        _ask_backup(report, env, tables, source, tables.unknown)
    return tables


def find_older(report: Report, env: Environment, tables: Tables, definitions: Definitions, source: Stores) -> None:
    """A table that was made anew in the window had another OID before: the newest base backup knows it."""
    alive = [one for one in tables.found if one.where == env.postgres.database]
    if any(one.key in definitions.made for one in alive):
        _ask_backup(report, env, tables, source, "it was made in the window")


def _ask_backup(report: Report, env: Environment, tables: Tables, source: Stores, reason: str) -> None:
    try:
        found = _in_backup(report, env, tables.typed, source)
    except (OpsError, VerificationFailed) as error:
        report.warn("the catalog of the newest base backup", error.hint, value=f"{reason}; {error.message}")
        return
    known = {(one.key, one.file) for one in tables.found}
    tables.found += [one for one in found if (one.key, one.file) not in known]
    if found:
        report.fact("name found in", f"{found[0].where} ({reason})")


def _in_backup(report: Report, env: Environment, typed: str, source: Stores) -> tuple[Filed, ...]:
    store = store_for(env, "cluster", source)
    backups, _ = open_all(store, "cluster")
    own = [one for one in backups if one.manifest.environment == env.name and not one.failed]
    full = [one for one in own if cluster_in(one).form == "full"]
    if not full:
        raise OpsError(f"there is no full base backup in {store.where}", "name the table's OID (oid), if you know it")
    newest = max(full, key=lambda one: one.manifest.taken)
    if problems := read_files(report, newest):
        raise VerificationFailed(f"{newest.name}: {problems[0]}", "name the table's OID (oid), if you know it")
    with tempfile.TemporaryDirectory(prefix="ops-catalog-") as directory:
        return find_in_backup(newest.path, env.postgres.database, typed, Path(directory), newest.name)


def trace_files(tables: Tables, definitions: Definitions) -> Files:
    """The files that each of the tables had, and what happened to it in the window."""
    names, events = dict[Pair, str](), list[tuple[Definition, str, str, int]]()
    toast = {(one.database, one.toast) for one in tables.found if one.toast}
    for key in dict.fromkeys(one.key for one in tables.found):
        own = [one for one in tables.found if one.key == key]
        known, name = {(one.database, one.file) for one in own} | {key}, tables.told(own[0])  # its first file: its OID
        for file in trace(definitions.found, key, known):
            names.setdefault(file, name)
        events += [(one, what, name, key[0]) for one in definitions.found if (what := one.does_to(key))]
    return Files({**names, **dict.fromkeys(toast, "TOAST")}, frozenset(toast), events)
