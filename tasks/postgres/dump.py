"""A dump and its manifest, taken in one exported snapshot.

The tables are locked before the snapshot is taken: a TRUNCATE between the two would leave dump and manifest agreeing
on an empty table. https://www.postgresql.org/docs/current/app-pgdump.html
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres import Connection, Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.log import logger
from runbook.progress import progress
from runbook.render import size
from tasks.host import disk_of
from tasks.postgres.content import DatabaseContent, content_in_session
from tasks.postgres.definitions import dumped_definitions
from tasks.postgres.dumped_sequences import column_maxima, dumped_sequences, find_behind, spelled_by_server
from tasks.postgres.server import program_version
from tasks.postgres.session import pin

DUMP = "dump"
GLOBALS = "globals.sql"
ATTEMPTS = 3
SERIAL_ATTEMPTS = 6
# All tables are locked by the exporting session: whoever has to wait now waits behind somebody who waits for that one.
LOCK_WAIT = "1s"
FULL_BYTES = 1 << 20
STATISTICS_VERSION = 180000
# pg_dump compresses: on a busy host the application comes first.
NICE = 10
COMPRESSIONS = ("zstd:1", "lz4:1", "gzip:1")


@dataclass(frozen=True)
class Dumped:
    """A dump in a directory: the moment and content of its snapshot, and what took how long."""

    taken: datetime
    content: DatabaseContent
    compression: str
    jobs: int
    dump_seconds: float
    manifest_seconds: float
    behind: tuple[str, ...]


class _Contended(Exception):
    """Somebody waits for an exclusive lock on a table that is being dumped: whoever comes later waits behind him."""


@action
def dump_database(postgres: Postgres, directory: Path, jobs: int) -> Dumped:
    """Dump the application's database in directory format, and read its manifest in the same snapshot meanwhile.

    A TRUNCATE or ALTER TABLE that comes meanwhile waits for this session's locks. pg_dump's processes that ask for
    theirs later would wait behind it for ever, so they give up at once and the dump begins anew; after two tries it
    takes one process only, which asks but once, at its start.

    Raises:
        CommandFailed: pg_dump failed.
        OpsError: tables are locked, truncated or altered again and again.
    """
    compression = best_compression(postgres)
    for workers in (jobs, jobs, *[1] * SERIAL_ATTEMPTS):
        try:
            return _dump_once(postgres, directory, workers, compression)
        except _Contended:
            shutil.rmtree(directory / DUMP, ignore_errors=True)
            logger().info("a table was truncated or altered while it was being dumped: again")
    raise OpsError(
        "tables are truncated or altered again and again while they are dumped",
        "look for TRUNCATE and ALTER TABLE in pg_stat_activity, pause them, and try again",
    )


def _dump_once(postgres: Postgres, directory: Path, jobs: int, compression: str) -> Dumped:
    """The manifest is read by the session that exports the snapshot: it holds its locks already."""
    with _snapshot(postgres) as (exporter, snapshot, taken), ThreadPoolExecutor(1) as beside:
        failpoint("dump: snapshot exported")
        dumping = beside.submit(_pg_dump, postgres, directory / DUMP, snapshot, compression, jobs)
        started = time.monotonic()
        content = content_in_session(exporter, postgres.database)
        manifest_seconds = time.monotonic() - started
        maxima = column_maxima(exporter)
        seconds = dumping.result()
        sequences = spelled_by_server(exporter, dumped_sequences(postgres, directory / DUMP))
    definitions = dumped_definitions(postgres, directory / DUMP)
    content = content.model_copy(update={"sequences": sequences, "definitions": definitions})
    return Dumped(taken, content, compression, jobs, seconds, manifest_seconds, find_behind(sequences, maxima))


@action
def dump_globals(postgres: Postgres, directory: Path) -> Path:
    """Roles and tablespaces, without password hashes."""
    path = directory / GLOBALS
    argv = [postgres.program("pg_dumpall"), "--globals-only", "--no-role-passwords", "--no-password"]
    shell.run([*argv, f"--file={path}"], environment=postgres.environment())
    return path


def best_compression(postgres: Postgres) -> str:
    """The best compression that this pg_dump was built with."""
    return next(wanted for wanted in COMPRESSIONS if knows_compression(postgres, wanted))


def knows_compression(postgres: Postgres, wanted: str) -> bool:
    """Whether the programs were built with `zstd`, `lz4` or `gzip`."""
    argv = [postgres.program("pg_dump"), f"--compress={wanted}", "--format=plain", "--no-password"]
    try:
        shell.run(argv, environment={"PGHOST": "127.0.0.1", "PGPORT": "1", "LC_MESSAGES": "C"})
    except CommandFailed as error:
        return "compression" not in error.stderr  # else it went on to the connection, which nobody answers
    return True


def carries_statistics(postgres: Postgres) -> bool:
    """Whether these programs can put planner statistics into a dump (from 18 on)."""
    return program_version(postgres, "pg_dump") * 10000 >= STATISTICS_VERSION


def compression_of(names: Iterable[str]) -> str:
    """How a dump with such files is compressed."""
    endings = {name.rsplit(".", 1)[-1] for name in names}
    return next((method for ending, method in (("zst", "zstd"), ("lz4", "lz4")) if ending in endings), "gzip")


@contextmanager
def _snapshot(postgres: Postgres) -> Iterator[tuple[Connection, str, datetime]]:
    for attempt in range(ATTEMPTS):
        with postgres.connect(postgres.database) as connection:
            pin(connection)
            before = _lockable(connection)
            execute(connection, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                for schema, table in before:
                    name = sql.Identifier(schema, table)
                    connection.execute(sql.SQL("LOCK TABLE ONLY {} IN ACCESS SHARE MODE").format(name))
                row = execute(connection, "SELECT pg_export_snapshot(), clock_timestamp()")[0]
                changed = _lockable(connection) != before
            except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
                changed = True
            except psycopg.errors.LockNotAvailable:
                raise OpsError(
                    "a table is locked by somebody else for more than a minute",
                    "look for an ALTER TABLE or a long transaction in pg_stat_activity, end it, and try again",
                ) from None
            if not changed:
                yield connection, str(row[0]), row[1].astimezone(UTC)
                return
        logger().info("tables came or went while they were being locked (attempt %d): again", attempt + 1)
    raise OpsError("tables keep coming and going, so no snapshot could be taken", "stop the migrations, then try again")


def _lockable(connection: Connection) -> list[tuple[str, str]]:
    rows = execute(
        connection,
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' "
        "AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1, 2",
    )
    return [(str(schema), str(table)) for schema, table in rows]


def _pg_dump(postgres: Postgres, target: Path, snapshot: str, compression: str, jobs: int) -> float:
    argv = [
        *(postgres.program("pg_dump"), "--format=directory", f"--jobs={jobs}", f"--compress={compression}"),
        *(
            f"--snapshot={snapshot}",
            f"--lock-wait-timeout={LOCK_WAIT}",
            "--no-sync",
            "--no-password",
            "--large-objects",
        ),
        *(["--statistics"] if carries_statistics(postgres) else []),
        *("--file", str(target)),
    ]
    environment = {**postgres.environment(), "PGDATABASE": postgres.database, "PGOPTIONS": "-c lc_messages=C"}
    try:
        with progress(lambda: f"{size(sum(p.stat().st_size for p in target.glob('*')))} dumped"):
            return shell.run(argv, environment=environment, nice=NICE, hint="nothing was published").seconds
    except CommandFailed as error:
        if re.search(r"could not obtain lock|lock timeout|55P03", error.stderr):
            raise _Contended from None
        if (free := disk_of(target).free_bytes) < FULL_BYTES:  # pg_dump's own message does not say so
            raise OpsError(f"the store is full: {size(free)} free", f"free space at {target.parents[1]}") from None
        raise
