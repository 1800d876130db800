"""What a table's name means in WAL, which names files only: its OIDs and files, from every catalog that can be read."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from blocks.postgres.server import Postgres
from flows.store import read_files, store_for
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Report
from tasks.backups.catalogue import open_all
from tasks.cluster.catalog import find_in_backup
from tasks.cluster.content import cluster_in
from tasks.postgres.restore.superseded import find_superseded, read_swap
from tasks.postgres.tables.filenodes import FiledRelation, find_filed, read_database_oid
from tasks.wal.reading.transactions import Definition, Definitions, Pair, trace

BY_OID = "find the table's OID in the list of dropped tables, then set table to that number"


@dataclass
class Tables:
    """What a name means in each catalog that answered. `database`: OID of the live database, 0 if the server does not
    answer; `kept`: databases that restores replaced; `swap`: transaction of the last swap; `unknown`: why the live
    database has no such table."""

    typed: str
    database: int = 0
    kept: tuple[str, ...] = ()
    swap: int = 0
    found: list[FiledRelation] = field(default_factory=list)
    unknown: str = ""

    @property
    def databases(self) -> frozenset[int]:
        """OIDs of the databases that have or had the table."""
        return frozenset({self.database, *(one.database for one in self.found)} - {0})

    def label(self, one: FiledRelation) -> str:
        """A table's name, followed by its database unless that is the live one."""
        if one.database == self.database or not self.database:
            return one.name
        return f"{one.name} in {self.place(one.database)}"

    def place(self, database: int) -> str:
        """The name of a database other than the live one."""
        kept = [one.where for one in self.found if one.database == database and one.where in self.kept]
        return kept[0] if kept else f"a database that had this name before (OID {database})"


@dataclass(frozen=True)
class TableFiles:
    """Files that contain or contained a table's rows, each with the table's name; its TOAST files; and what whole-table
    operations happened in the window: transaction, operation, table, database OID."""

    names: dict[Pair, str]
    toast: frozenset[Pair]
    events: list[tuple[Definition, str, str, int]]


def find_tables(report: Report, env: Environment, typed: str, source: Stores) -> Tables:
    """Look up a table by name in the live database, in databases that restores kept, on the standby, and in the newest
    base backup. A number is a table's OID in the live database.

    Raises:
        OpsError: the database of an OID is unknown.
    """
    live = env.postgres
    tables, queried = Tables(typed), list[tuple[Postgres, str]]()
    if nodes.ask(live):
        tables.database = read_database_oid(live, live.database)
        tables.kept = tuple(old.name for old in find_superseded(live))
        tables.swap = read_swap(live)
        queried = [(live, name) for name in (live.database, *tables.kept)]
    else:
        tables.unknown = "the server does not answer"
    if env.has("standby") and nodes.ask(env.standby):
        queried.append((env.standby, live.database))
    if typed.isdecimal():
        tables.found.append(_by_oid(tables, int(typed), queried))
        return tables
    for server, name in queried:
        try:
            found = find_filed(server, name, typed)
        except OpsError as error:
            if (server, name) == (live, live.database):
                tables.unknown = f"{error.message}" + (f" ({error.hint})" if "did you mean" in error.hint else "")
            continue
        where = name if server is live else f"{name} on the standby"
        tables.found += [replace(one, where=where) for one in found]
    if not any(one.where == live.database for one in tables.found):
        _look_in_backup(report, env, tables, source, tables.unknown)
    return tables


def _by_oid(tables: Tables, oid: int, queried: list[tuple[Postgres, str]]) -> FiledRelation:
    database = tables.database or next((read_database_oid(server, name) for server, name in queried), 0)
    if not database:
        raise OpsError(f"the database of OID {oid} is unknown: {tables.unknown}", "start the server or the standby")
    return FiledRelation(database, oid, f"OID {oid}", oid, 0, "the form")


def find_older(report: Report, env: Environment, tables: Tables, definitions: Definitions, source: Stores) -> None:
    """A table that was created in the window replaced one with another OID: the newest base backup contains that."""
    alive = [one for one in tables.found if one.where == env.postgres.database]
    if any(one.key in definitions.made for one in alive):
        _look_in_backup(report, env, tables, source, "it was created in the window")


def _look_in_backup(report: Report, env: Environment, tables: Tables, source: Stores, reason: str) -> None:
    try:
        found = _tables_in_backup(report, env, tables.typed, source)
    except (OpsError, VerificationFailed) as error:
        report.warn("catalog of the newest base backup", error.hint, value=f"{reason}; {error.message}")
        return
    known = {(one.key, one.file) for one in tables.found}
    tables.found += [one for one in found if (one.key, one.file) not in known]
    if found:
        report.fact("name found in", f"{found[0].where} ({reason})")


def _tables_in_backup(report: Report, env: Environment, typed: str, source: Stores) -> tuple[FiledRelation, ...]:
    store = store_for(env, "cluster", source)
    backups, _ = open_all(store, "cluster")
    own = [one for one in backups if one.manifest.environment == env.name and not one.failed]
    full = [one for one in own if cluster_in(one).form == "full"]
    if not full:
        raise OpsError(f"there is no full base backup in {store.where}", BY_OID)
    newest = max(full, key=lambda one: one.manifest.taken)
    if problems := read_files(report, newest):
        raise VerificationFailed(f"{newest.name}: {problems[0]}", BY_OID)
    with tempfile.TemporaryDirectory(prefix="ops-catalog-") as directory:
        return find_in_backup(newest.path, env.postgres.database, typed, Path(directory), newest.name)


def trace_files(tables: Tables, definitions: Definitions) -> TableFiles:
    """The files that each of the tables had in the window, and what happened to whole tables."""
    names, events = dict[Pair, str](), list[tuple[Definition, str, str, int]]()
    toast = {(one.database, one.toast) for one in tables.found if one.toast}
    for key in dict.fromkeys(one.key for one in tables.found):
        own = [one for one in tables.found if one.key == key]
        known, name = {(one.database, one.file) for one in own} | {key}, tables.label(own[0])  # its first file: its OID
        for file in trace(definitions.found, key, known):
            names.setdefault(file, name)
        events += [(one, what, name, key[0]) for one in definitions.found if (what := one.does_to(key))]
    return TableFiles({**names, **dict.fromkeys(toast, "TOAST")}, frozenset(toast), events)
