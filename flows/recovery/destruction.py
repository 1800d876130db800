"""Whether a statement in the WAL dropped the database or emptied a table: a recovery then stops just before it."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from blocks.postgres.server import Postgres
from flows.recovery.point.choice import PointOrigin
from flows.recovery.point.target import FoundTarget, before_drops
from flows.store import store_for
from runbook import clock
from runbook.errors import OpsError, VerificationFailed
from runbook.report import Report
from runbook.units import counted, duration
from tasks.backups.catalogue import Backup, find_backup
from tasks.cluster.catalog import databases_in, has_database
from tasks.cluster.target import Stop, find_stop_at
from tasks.failover.member import control_of
from tasks.host.disk import is_here
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.tables.emptied import EmptiedTables, find_emptied_tables
from tasks.postgres.tables.filenodes import FiledDatabase, find_filed_database
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.format.pages import Files
from tasks.wal.reading.destruction import (
    DatabaseRow,
    Destruction,
    Statement,
    WalDefinitions,
    find_emptied,
    find_mark,
    read_definitions,
)
from tasks.wal.reading.transactions import End
from tasks.wal.reading.waldump import Commit

MOST_SHOWN = 5
TARGET = "recovery target"
"""The name of its pin."""
UNEXPLAINED = "no statement in the WAL explains what is missing in the copy"
NONE = "none"
"""Given as `before`: recover to the end of the WAL, whatever was destroyed."""


@dataclass(frozen=True)
class DatabaseAtEnd:
    """The application's database at the end of its WAL, by the live server or by a copy that replayed all WAL."""

    database: FiledDatabase
    emptied: EmptiedTables

    @property
    def oid(self) -> int:
        """Its OID; 0 if it does not exist."""
        return self.database.oid

    @property
    def invalid(self) -> bool:
        """Whether an interrupted DROP DATABASE marked it as invalid."""
        return self.database.invalid

    @property
    def destroyed(self) -> str:
        """What is missing; "" if nothing is."""
        if not self.oid:
            return "the database does not exist"
        if self.invalid:
            return "the database is invalid: a DROP DATABASE was interrupted"
        return self.emptied.text if self.emptied.empty or self.emptied.missing else ""


@dataclass(frozen=True)
class BackupTables:
    """The tables of the newest dump with their rows, and its revision."""

    backup: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    revision: str = ""


@dataclass(frozen=True)
class WalTarget:
    """Where a recovery stops, and the statement that it leaves out (None: it recovers all WAL)."""

    stop: Stop
    destruction: Destruction | None = None
    given_up: int = 0

    @property
    def is_the_end(self) -> bool:
        """Whether it is the end of the WAL."""
        return self.destruction is None and not self.given_up and self.stop.after is None


def commits(number: int) -> str:
    """`1 commit`, `2 commits`."""
    return counted(number, "commit")


def tables_of(backup: Backup | None) -> BackupTables:
    """The tables of a dump."""
    if backup is None:
        return BackupTables()
    content = content_in(backup)
    rows = {name: table.rows for name, table in content.tables.items() if "." in name}
    return BackupTables(backup.name, rows, content.revision)


def newest_dump(env: Environment, source: str, stores: Stores = "backups") -> Backup | None:
    """The newest dump of an environment in the stores of this one; None without any."""
    with contextlib.suppress(OpsError, ValueError):
        return find_backup.work(store_for(env, "postgres", stores), "postgres", environment=source)
    return None


def read_end(postgres: Postgres, database: str, tables: Mapping[str, int]) -> DatabaseAtEnd:
    """Query a server for the database, and for tables that are empty or missing.

    Raises:
        OpsError, Unreachable: it does not answer.
    """
    found = find_filed_database(postgres, database)
    if not found.oid or found.invalid:
        return DatabaseAtEnd(found, EmptiedTables({}, ()))
    return DatabaseAtEnd(found, find_emptied_tables(postgres, database, tables))


def read_live_end(env: Environment, system: int, tables: Mapping[str, int]) -> DatabaseAtEnd | None:
    """The live database, if its server answers and is of the cluster `system`, or was shut down without it; None
    otherwise."""
    live = nodes.ask(env.postgres)
    if live is None:
        return _stopped_end(env, system)
    if live.system != system:
        return None
    with contextlib.suppress(OpsError):
        return read_end(env.postgres, env.postgres.database, tables)
    return None


def _stopped_end(env: Environment, system: int) -> DatabaseAtEnd | None:
    """Only after a shutdown the files say that there is no such database; of an existing one they say no more."""
    control = control_of(env.postgres)
    if control is None or control.state != "shut down" or control.system != system:
        return None
    with contextlib.suppress(OSError, ValueError, struct.error):
        if not has_database(Path(env.postgres.data_directory), env.postgres.database):
            return DatabaseAtEnd(FiledDatabase(0), EmptiedTables({}, ()))
    return None


def find_target(
    report: Report,
    env: Environment,
    origin: PointOrigin,
    found: FoundTarget,
    latest: Stop,
    directory: Path,
    tables: BackupTables,
    end: DatabaseAtEnd | None,
    before: str,
    rejected: Collection[int],
) -> WalTarget:
    """Where to stop: at the end of the WAL (`latest`), or before the statement that destroyed data.

    `end` None: the server does not answer. Then it stops at the end of the WAL, and the staged copy shows whether
    something is missing. `before`: a transaction ID chosen by a person, or `none`. `rejected`: transactions that a
    copy showed not to be the right ones.
    """
    files = [(link.segment, directory / link.segment.name) for link in found.links]
    if before == NONE:
        return WalTarget(latest)
    if not files:  # nothing was written since the base backup: rows that are missing were missing then
        _require_database(env, origin, is_created=False)
        if end and end.oid and not end.invalid and (rest := [*end.emptied.empty, *_missing(report, tables, end)]):
            _warn_empty(report, origin, tables, rest)
        return WalTarget(latest)
    if before:
        return _chosen(env, origin, found, files, before)
    oids = {end.oid} if end and end.oid else set[int]()
    newest = found.newest.lsn if found.newest else 0
    definitions = read_definitions(env.postgres, files, oids, origin.content.stop, newest)
    _require_database(env, origin, is_created=bool(definitions.databases.created))
    if end is None:
        _show_drops(report, definitions)
        return WalTarget(latest)
    if end.invalid:
        return _interrupted(env, origin, found, latest, files, end.database)
    if end.oid:
        destroyed = _emptied(report, env, origin, files, definitions, tables, end, rejected)
        destroyed = destroyed or _planned(report, found, end.oid, rejected)
    else:
        destroyed = _dropped(env, definitions, rejected)
    if destroyed:
        return _before(env, origin, found, files, destroyed)
    if rejected:  # the end of the WAL has what these statements did
        raise VerificationFailed(UNEXPLAINED, "find-transaction shows who deleted it: before=TRANSACTION stops there")
    return WalTarget(latest)


def _require_database(env: Environment, origin: PointOrigin, *, is_created: bool) -> None:
    """Refuse a base backup that was taken while the database did not exist, unless the WAL creates one."""
    if not origin.content.has_database and not is_created:
        raise VerificationFailed(
            f"neither {origin.backup.name} nor the WAL after it has the database {env.postgres.database}",
            "restore from an older base backup (backup=…), or from a dump",
        )


_TRANSACTION = re.compile(r"\s(\d+),\s")


def _planned(report: Report, found: FoundTarget, database: int, rejected: Collection[int]) -> Destruction | None:
    """The statement before which the confirmed plan stops. Clients may have filled an emptied table again since."""
    text = report.pinned.planned(TARGET) if report.pinned else ""
    xids = {int(number) for number in _TRANSACTION.findall(text)}.difference(rejected)
    statement, _, tables = text.partition(" by ")[0].partition(" of ")
    for one in found.commits:
        if one.xid in xids:
            end = End(one.xid, one.lsn, one.at, committed=True)
            names = tuple(tables.split(", ")) if tables else ()
            planned = Destruction(cast(Statement, statement), end, one.lsn, database, names)
            if planned.text == text:
                return planned
    return None


def _chosen(env: Environment, origin: PointOrigin, found: FoundTarget, files: Files, before: str) -> WalTarget:
    if "/" in before:
        with contextlib.suppress(ValueError):
            stop = before_drops(env, origin, find_stop_at(found.commits, lsn_of(before)), found.commits, files)
            return WalTarget(stop, None, sum(commit.lsn >= stop.lsn for commit in found.commits))
    if not before.strip().isdecimal():
        raise OpsError(f"before is “{before[:40]}”", "give a transaction ID, an LSN, none, or nothing")
    xid = int(before) & 0xFFFFFFFF
    one = next((commit for commit in found.commits if commit.xid == xid), None)
    if one is None:
        raise OpsError(f"transaction {before} is not in the WAL after the base backup", "give another transaction ID")
    return _stop_before(env, origin, found, files, one)


def _before(
    env: Environment, origin: PointOrigin, found: FoundTarget, files: Files, destroyed: Destruction
) -> WalTarget:
    one = next(commit for commit in found.commits if commit.lsn == destroyed.end.lsn)
    target = _stop_before(env, origin, found, files, one)
    return WalTarget(target.stop, replace(destroyed, begin=target.stop.lsn), max(target.given_up - 1, 0))


def _interrupted(
    env: Environment, origin: PointOrigin, found: FoundTarget, latest: Stop, files: Files, database: FiledDatabase
) -> WalTarget:
    """Just before the mark of a DROP DATABASE that did not commit. Where the WAL does not have it, the copy shows
    whether that is later than the newest commit, or earlier than the base backup."""
    newest = found.newest.lsn if found.newest else 0
    row = DatabaseRow(f"1664/0/{database.file}", database.block, database.off)
    begin = find_mark(env.postgres, files, row, newest=newest)
    if begin < origin.content.stop:
        return WalTarget(latest)
    stop = find_stop_at(found.commits, begin)
    end = End(0, begin, stop.before.at if stop.before else origin.content.stopped, committed=False)
    given_up = sum(one.lsn >= begin for one in found.commits)
    return WalTarget(stop, Destruction("DROP DATABASE", end, begin, database.oid), given_up)


def _stop_before(env: Environment, origin: PointOrigin, found: FoundTarget, files: Files, one: Commit) -> WalTarget:
    stop = before_drops(env, origin, find_stop_at(found.commits, one.lsn), found.commits, files)
    return WalTarget(stop, None, sum(commit.lsn >= stop.lsn for commit in found.commits))


def _show_drops(report: Report, definitions: WalDefinitions) -> None:
    """Databases that the WAL drops. Which of them was the application's, the staged copy shows."""
    if drops := definitions.databases.found:
        report.fact(
            "databases dropped in the WAL",
            f"{'; '.join(f'OID {one.database} by transaction {one.end.xid}' for one in drops[-MOST_SHOWN:])}. If the "
            "staged copy lacks the application's database, it is built again up to just before the right one",
        )


def _dropped(env: Environment, definitions: WalDefinitions, rejected: Collection[int]) -> Destruction | None:
    """The DROP DATABASE of the application's database, which does not exist at the end of the WAL. WAL has OIDs only;
    the data directory knows which databases had its name. The staged copy proves it."""
    drops = [one for one in definitions.databases.found if one.end.xid not in rejected]
    named = set[int]()
    if is_here(env.postgres.host):
        with contextlib.suppress(OSError, ValueError, VerificationFailed):
            named = databases_in(Path(env.postgres.data_directory), env.postgres.database)
    known = [one for one in drops if one.database in named]
    return (known or drops)[-1] if drops else None


def _emptied(
    report: Report,
    env: Environment,
    origin: PointOrigin,
    files: Files,
    definitions: WalDefinitions,
    tables: BackupTables,
    end: DatabaseAtEnd,
    rejected: Collection[int],
) -> Destruction | None:
    """The first statement that emptied or dropped a table which is empty or missing now."""
    missing = _missing(report, tables, end)
    if not end.emptied.empty and not missing:
        return None
    found = find_emptied(
        env.postgres,
        files,
        definitions.tables,
        end.emptied.empty,
        missing,
        tables.rows,
        origin.content.stop,
        definitions.newest,
    )
    found = [one for one in found if one.end.xid not in rejected]
    rest = [*end.emptied.empty, *missing]
    # A table may have been emptied and filled before: a restore truncates what it fills. Of several transactions that
    # dropped relations, any may have dropped the missing tables: the last one is tried first.
    if last := {name: one for one in found for name in one.tables}:
        return min(last.values(), key=lambda one: one.end.lsn)
    _warn_empty(report, origin, tables, rest)
    return None


def _missing(report: Report, tables: BackupTables, end: DatabaseAtEnd) -> Sequence[str]:
    """The tables that a statement may have dropped; those that a migration may have dropped are only named."""
    missing, named = end.emptied.missing, end.emptied.missing_unfilled
    if end.emptied.revision != tables.revision:
        missing, named = (), (*missing, *named)
    if named:
        report.warn(
            "tables that the newest dump has, and the database has not",
            "nothing to do if they were dropped on purpose, or by a migration. Otherwise find the transaction "
            "(find-transaction), and run this again with before=TRANSACTION",
            value=", ".join(named),
        )
    return missing


def _warn_empty(report: Report, origin: PointOrigin, tables: BackupTables, names: Sequence[str]) -> None:
    report.warn(
        "tables without rows",
        f"if that is wrong: the rows were deleted step by step, or before {origin.backup.name}. method=dump restores "
        f"{tables.backup}, which has them; find-transaction shows who deleted them",
        value=", ".join(names),
        expected=f"rows, as in {tables.backup}",
    )


def report_target(report: Report, target: WalTarget, newest: Commit | None) -> None:
    """The statement that the recovery leaves out, and what is given up with it."""
    if not (destroyed := target.destruction):
        return
    stop = target.stop
    last = stop.before.text if stop.before else "the end of the base backup"
    span = duration((newest.at - destroyed.end.at).total_seconds()) if newest else "0 s"
    report.table(
        "Statement that destroyed data",
        ("statement", "transaction", "committed", "LSN", "recovery stops before", "commits given up after it"),
        [
            (
                destroyed.what,
                destroyed.end.xid,
                clock.text(destroyed.end.at),
                lsn_text(destroyed.end.lsn),
                lsn_text(stop.lsn),
                target.given_up,
            )
        ],
    )
    report.fact("target", f"just before {destroyed.text}")
    report.fact("last transaction restored", last)
    report.prefer(
        "data destroyed by a statement",
        not target.given_up,
        f"check that this statement was the mistake. To keep it, and the {commits(target.given_up)} after it, run "
        "this with before=none; before=TRANSACTION chooses another one",
        value=f"{destroyed.text}; {commits(target.given_up)} in {span} after it: given up",
    )
