"""The staged copy of a restore: created and filled. Nothing here changes the live database."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.current import leaves, removed
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.backups.catalogue import Backup, hand_of
from tasks.postgres.content.content import DatabaseContent
from tasks.postgres.dump.compression import unpacked_bytes
from tasks.postgres.dump.fill import DumpSource, fill, fill_remote, source_in
from tasks.postgres.restore.subscriptions import detach_subscriptions
from tasks.postgres.server.properties import Properties, apply_properties, creation
from tasks.postgres.upkeep.session import refusals

REPLACE = "replace database"
MAKE = "make database"
MOST_BYTES = 63


@dataclass(frozen=True)
class Copy:
    """A staged copy and its OID. `unfilled`: materialised views of foreign tables that could not be filled, with the
    reason. `accepted`: objects that an operator left out."""

    database: str
    oid: int
    seconds: float = 0.0
    unfilled: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()


def name_beside(database: str, suffix: str) -> str:
    """A database's name with a suffix, within PostgreSQL's 63 bytes; a hash keeps shortened names distinct."""
    if len((database + suffix).encode()) <= MOST_BYTES:
        return database + suffix
    mark = f"_{hashlib.sha256(database.encode()).hexdigest()[:8]}{suffix}"
    return database.encode()[: MOST_BYTES - len(mark.encode())].decode(errors="ignore") + mark


def copy_name(database: str) -> str:
    """The reserved name of a restore's staged copy; a leftover under it is dropped."""
    return name_beside(database, "__new")


def building_name(live: str, into: str) -> str:
    """The staged copy's name for a database that will be called `into`.

    Nobody else uses such a name, so a leftover under it is ours and can be dropped.
    """
    return name_beside(into, f"__new_{hashlib.sha256(f'interview-ops {live} {into}'.encode()).hexdigest()[:8]}")


def staged_database(name: str) -> str:
    """A staged database as reports name it."""
    return f"database {name}"


def is_reserved(database: str) -> bool:
    """Whether a name has one of the suffixes of databases that runs create and drop."""
    return bool(_RESERVED.search(database))


_RESERVED = re.compile(r"__(?:new(?:_[0-9a-f]{8})?|verify|tables|rehearsal|old_\d{8}_\d{6})$")


_last: tuple[object, DatabaseContent] | None = None


def content_in(backup: Backup) -> DatabaseContent:
    """The content manifest of a database's backup. The last one is kept: a run reads it many times."""
    global _last
    stored, kept = backup.manifest.content, _last
    if kept is None or kept[0] is not stored:
        _last = kept = (stored, DatabaseContent.model_validate(stored))
    return kept[1]


def dump_in(backup: Backup) -> DumpSource:
    """The dump of a fetched database backup."""
    content = content_in(backup)
    source = source_in(backup.path, content.bytes, parts=content.part == "tables")
    source = replace(source, unpacking=unpacking_in(backup), text_bytes=content_in(backup).text_bytes)
    if source.form == "plain":
        return replace(source, relations=len(content.tables) + len(content.sequences))
    fragile = frozenset((schema, table) for schema, table, _ in content.volatile_checks)
    if content.part != "full":
        return replace(source, unchecked=fragile)
    return replace(source, remote=content.remote_views, unchecked=fragile, stored=content.uncomputable)


def unpacking_in(backup: Backup) -> Path:
    """The directory of this process in which a backup's dump is unpacked for pg_restore."""
    return hand_of(backup.store, backup.manifest.environment) / f"{backup.name}.unpacked"


def unpacking_of(postgres: Postgres, backup: Backup, only: Collection[str] | None = None) -> dict[Path, int]:
    """Where a restore unpacks a backup's dump (`only`: some of its files), and the disk space for it in bytes; empty
    if pg_restore reads the dump as it is."""
    files = {name: file for name, file in backup.manifest.readable_files.items() if only is None or name in only}
    needed = unpacked_bytes(postgres, files, content_in(backup).text_bytes, some=only is not None)
    return {unpacking_in(backup): needed} if needed else {}


def scratch_name(database: str) -> str:
    """The reserved name of a verification's scratch database; a leftover under it is dropped."""
    return name_beside(database, "__verify")


def staging(postgres: Postgres, into: str) -> Act:
    """Return the act of a run that builds a staged copy: it replaces the live database, or makes the database
    `into`."""
    return Act(MAKE, into) if into else Act(REPLACE, postgres.database)


def staged_name(postgres: Postgres, into: str) -> str:
    """Return the name of the staged copy of the live database, or of the database `into`."""
    return building_name(postgres.database, into) if into else copy_name(postgres.database)


@action(of=staging, staged=True)
def create_copy(postgres: Postgres, into: str, properties: Properties) -> Copy:
    """Create an empty staged copy with these properties: of the live database, or of the database `into`. A leftover
    under its name is dropped."""
    return _create(postgres, properties, staged_name(postgres, into))


@action(idempotent=True)
def create_scratch(postgres: Postgres, properties: Properties) -> Copy:
    """Create an empty scratch database for a verification."""
    return _create(postgres, properties, scratch_name(postgres.database))


@action(idempotent=True)
def drop_scratch(postgres: Postgres) -> str:
    """Drop a verification's scratch database."""
    name = scratch_name(postgres.database)
    with postgres.connect() as connection:
        drop(postgres, connection, name)
    return name


def _create(postgres: Postgres, properties: Properties, name: str) -> Copy:
    with postgres.connect() as connection:
        drop(postgres, connection, name)
        leaves(staged_database(name), "the next run that stages one drops it")
        connection.execute(creation(name, properties))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
        return Copy(name, oid_of(connection, name))


@action(of=staging, staged=True)
def fill_copy(postgres: Postgres, into: str, source: DumpSource, properties: Properties, copy: Copy, jobs: int) -> Copy:
    """Restore a dump into the staged copy, then set the database's privileges and settings."""
    return _fill(postgres, source, properties, copy, jobs)


@action
def fill_scratch(postgres: Postgres, source: DumpSource, properties: Properties, scratch: Copy, jobs: int) -> Copy:
    """Restore a dump into a scratch database."""
    return _fill(postgres, source, properties, scratch, jobs)


def _fill(postgres: Postgres, source: DumpSource, properties: Properties, copy: Copy, jobs: int) -> Copy:
    seconds = fill(postgres, source, copy.database, copy.oid, jobs)
    unfilled = fill_remote(postgres, copy.database, source.remote) if source.remote else {}
    detach_subscriptions(postgres, copy.database)
    with postgres.connect() as connection:
        apply_properties(connection, copy.database, properties)
    return Copy(copy.database, copy.oid, seconds, unfilled, source.accepted)


@action(of=lambda target: Act(MAKE, target))
def rename_copy(postgres: Postgres, target: str, copy: Copy) -> str:
    """Rename a proven copy to its free target name.

    Raises:
        OpsError: the name was taken meanwhile, or a session uses the copy.
    """
    with postgres.connect() as connection, refusals(connection):
        rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
        try:
            connection.execute(rename.format(sql.Identifier(copy.database), sql.Identifier(target)))
        except psycopg.errors.DuplicateDatabase:
            raise OpsError(f"a database {target} exists now", "run this again with another name") from None
        except psycopg.errors.ObjectInUse:
            raise OpsError(
                f"a session uses {copy.database}, so it cannot be renamed to {target}",
                "end that session (pg_stat_activity), then run this again: it builds the copy anew",
            ) from None
    removed(staged_database(copy.database))
    return target


@probe
def try_login(postgres: Postgres, database: str) -> str:
    """Log in as the application's role: pg_hba.conf may exclude the database, a privilege may be missing.

    Raises:
        OpsError: the login is refused.
    """
    with postgres.connect(database, as_application=True) as connection:
        return str(execute(connection, "SELECT current_user")[0][0])


def drop(postgres: Postgres, connection: Connection, database: str) -> None:
    """Drop a staged or scratch database. FORCE, because backends of a killed pg_restore live on for seconds.

    Its subscriptions are dropped first, without contacting their publisher.

    Raises:
        OpsError: the server refuses it.
    """
    name = sql.Identifier(database)
    with refusals(connection):
        if execute(connection, "SELECT 1 FROM pg_database WHERE datname = %s AND datistemplate", database):
            connection.execute(sql.SQL("ALTER DATABASE {} IS_TEMPLATE false").format(name))
        detach_subscriptions(postgres, database, dropped=True)
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
    removed(staged_database(database))


def oid_of(connection: Connection, database: str) -> int:
    """A database's OID, 0 if it does not exist."""
    rows = execute(connection, "SELECT oid FROM pg_database WHERE datname = %s", database)
    return int(rows[0][0]) if rows else 0


def default_jobs() -> int:
    """The default number of workers for dump and restore."""
    return max(2, min(8, os.cpu_count() or 2))


def check_jobs(jobs: int) -> int:
    """The form's `jobs`; 0 is one per core.

    Raises:
        OpsError: out of bounds (the form's own check can be switched off).
    """
    if not 0 <= jobs <= 32:
        raise OpsError(f"jobs is {jobs}", "choose 0 (one per core) to 32")
    return jobs or default_jobs()
