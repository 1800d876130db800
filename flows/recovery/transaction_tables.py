"""Which OIDs and files are meant by a table's name, now and in a window of WAL, called with the open report."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocks import nodes
from blocks.environment import Environment, Stores
from flows.store import read_files, store_for
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Report
from tasks.catalogue import open_all
from tasks.cluster.catalog import find_in_backup
from tasks.cluster.content import cluster_in
from tasks.postgres.filenodes import Filed, find_filed, read_database_oid
from tasks.postgres.superseded import find_superseded, read_swap
from tasks.wal.transactions import Definition, Definitions, Pair, trace


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
            raise OpsError(f"the database of OID {oid} cannot be told: {tables.unknown}",
                           "start the server, or the standby, or name the table without its OID")  # fmt: skip
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
