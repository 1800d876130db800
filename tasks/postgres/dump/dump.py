"""A dump and its manifest, taken in one exported snapshot.

https://www.postgresql.org/docs/current/app-pgdump.html
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import psycopg

from blocks.postgres.server import Connection, Postgres, first_line
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable, VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.log import logger
from runbook.progress import progress
from runbook.units import size
from tasks.host.disk import disk_of
from tasks.postgres.content.content import Beside, DatabaseContent, Part, SequenceValue, content_in_session
from tasks.postgres.content.definitions import definitions_seen, dumped_definitions
from tasks.postgres.content.pinned_session import LOCK_SECONDS
from tasks.postgres.dump.compression import ZSTD, Compressing, compressing, knows_compression
from tasks.postgres.dump.dumped_sequences import column_maxima, dumped_sequences, find_behind, set_by, spelled_by_server
from tasks.postgres.dump.generated import DIRECTORY, find_uncomputable, write_rows
from tasks.postgres.dump.plain import COMPRESSED, PLAIN, read_plain
from tasks.postgres.dump.printed import decoded
from tasks.postgres.dump.priority import limit_workers, lowered
from tasks.postgres.dump.progress import DumpProgress, Weights, weights_of
from tasks.postgres.dump.snapshot import SecondSession, exported_snapshot, too_many_tables
from tasks.postgres.server.server import program_version
from tasks.postgres.upkeep.session import refusals

Form = Literal["full", "schema", "tables", "sql", "sql.gz"]
DUMP = "dump"
GLOBALS = "globals.sql"
SERIAL_ATTEMPTS = 6
# The exporting session has locked all tables: a pg_dump that waits now waits behind a session that waits for that one.
LOCK_WAIT = "1s"
FULL_BYTES = 1 << 20
STATISTICS_VERSION = 180000
# Compression uses the processor: on a busy host the application comes first.
NICE = 10
# pg_dump's message if the server stops between its connection and its first statement.
_ENDED, _AGAIN = "invalid client encoding", "run this again when PostgreSQL answers; nothing was published"


@dataclass(frozen=True)
class Dumped:
    """A dump in a directory: the time and content of its snapshot, the durations, the sequences that are behind their
    columns, and the most disk space that uncompressed rows used at any moment."""

    taken: datetime
    content: DatabaseContent
    compression: str
    jobs: int
    dump_seconds: float
    manifest_seconds: float
    behind: tuple[str, ...]
    peak_bytes: int = 0


class _Contended(Exception):
    """The reason to restart a dump: another session waits for an exclusive lock on a dumped table and blocks later
    ones, or an object that cannot be locked (a view, a sequence, a function) was dropped."""


@dataclass(frozen=True)
class What:
    """The parts of a database to dump, and the form. `chosen`: the tables of the form `tables`; `others`: the rest."""

    form: Form = "full"
    chosen: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    @property
    def part(self) -> Part:
        """The part of the database that it contains."""
        return "schema" if self.form == "schema" else "tables" if self.form == "tables" else "full"

    @property
    def file(self) -> str:
        """The dump's name in its backup."""
        return {"sql": PLAIN, "sql.gz": COMPRESSED}.get(self.form, DUMP)


FULL = What()


@action
def dump_database(postgres: Postgres, directory: Path, jobs: int, what: What = FULL) -> Dumped:
    """Dump the application's database, or a part of it, and read its manifest in the same snapshot in parallel.

    A TRUNCATE or ALTER TABLE waits for this session's locks. pg_dump's later lock requests would wait behind it
    forever, so they give up at once and the dump restarts; after two attempts with one process, which locks only at its
    start.

    Raises:
        CommandFailed: pg_dump failed.
        OpsError: tables are locked, truncated or altered repeatedly.
    """
    built_in, last = knows_compression(postgres, ZSTD), ""
    for workers in (jobs, jobs, *[1] * SERIAL_ATTEMPTS):
        try:
            return _dump_once(postgres, directory, workers, what, built_in=built_in)
        except _Contended as why:
            shutil.rmtree(directory / DUMP, ignore_errors=True)
            shutil.rmtree(directory / DIRECTORY, ignore_errors=True)
            (directory / what.file).unlink(missing_ok=True)
            last = str(why)
            logger().info("%s during the dump: restarting it", why)
    raise OpsError(
        f"objects are truncated, altered or dropped repeatedly during the dump; last: {last}",
        "find TRUNCATE, ALTER and DROP in pg_stat_activity, pause those jobs, then run this again",
    )


def _dump_once(postgres: Postgres, directory: Path, jobs: int, what: What, *, built_in: bool) -> Dumped:
    """The session that exports the snapshot also reads the manifest: it already holds the locks. A second one helps it
    when pg_dump has ended."""
    target = directory / what.file
    with (
        exported_snapshot(postgres) as (exporter, snapshot, taken),
        ThreadPoolExecutor(1) as pool,
        refusals(exporter, LOCK_SECONDS),
        ExitStack() as stack,
    ):
        failpoint("dump: snapshot exported")
        encoding = exporter.info.parameter_status("server_encoding")  # a database can set another for its clients
        options = [
            *_options(postgres, what, jobs, built_in=built_in),
            *_in_snapshot(snapshot),
            f"--encoding={encoding}",
        ]
        weights = _weights(exporter, what)
        done = DumpProgress(postgres, target, weights)
        limit_workers(exporter, jobs)
        lower = stack.enter_context(lowered(postgres, exporter, sum(weights.tables.values())))
        behind = 0 if built_in or what.file != DUMP else jobs
        dumping = pool.submit(_pg_dump, postgres, target, options, done, behind)
        second = SecondSession(postgres, snapshot, lower)
        dumping.add_done_callback(second.start)
        shared = second.beside if jobs > 1 and what.file == DUMP else None
        with _translating(postgres):
            content, manifest_seconds, maxima = _manifest(exporter, directory, what, shared)
        seconds, packed = dumping.result()
        definitions, dumped = _read_back(postgres, target, snapshot, exporter.info.encoding)
        sequences = spelled_by_server(exporter, dumped) if what.part != "schema" else {}
    read_back = {"sequences": sequences, "definitions": definitions, "text_bytes": packed.text_bytes}
    used = {"sql.gz": "gzip:6", "sql": "not compressed"}.get(what.form, ZSTD)
    lagging = find_behind(sequences, maxima)
    jobs = jobs if what.file == DUMP else 1
    content = content.model_copy(update=read_back)
    return Dumped(taken, content, used, jobs, seconds, manifest_seconds, lagging, packed.peak_bytes)


def _manifest(
    exporter: Connection, directory: Path, what: What, shared: Beside | None
) -> tuple[DatabaseContent, float, dict[str, tuple[str, int]]]:
    """The content without what is read from the dump, the seconds for it, and the largest value of each column that has
    a sequence. Rows whose generated columns a restore cannot compute go to files of their own."""
    started = time.monotonic()
    content = content_in_session(exporter, exporter.info.dbname, what.part, what.chosen, shared)
    seconds = time.monotonic() - started
    maxima = column_maxima(exporter) if what.part == "full" else {}
    uncomputable = find_uncomputable(exporter) if what.part != "schema" else ()
    if what.part == "full" and what.file == DUMP:
        write_rows(exporter, directory, uncomputable)
    return content.model_copy(update={"uncomputable": uncomputable}), seconds, maxima


def _read_back(
    postgres: Postgres, target: Path, snapshot: str, of_ascii: str
) -> tuple[dict[str, str], dict[str, SequenceValue]]:
    """The definitions and the sequences' values of a dump. `of_ascii`: the encoding in which the exporter's session
    reads names of a database in SQL_ASCII.

    Raises:
        VerificationFailed: it is a truncated text.
    """
    if target.name == DUMP:
        return dumped_definitions(postgres, target, of_ascii), dumped_sequences(postgres, target, of_ascii)
    complete, setting = read_plain(target)
    if not complete:
        raise VerificationFailed(f"{target.name} is truncated: pg_dump was interrupted", "run this again")
    with _translating(postgres):
        return definitions_seen(postgres, postgres.database, *_in_snapshot(snapshot)), set_by(
            decoded(postgres, setting, of_ascii=of_ascii)
        )


@action
def dump_globals(postgres: Postgres, directory: Path) -> Path:
    """Roles and tablespaces, without password hashes."""
    path = directory / GLOBALS
    argv = [postgres.program("pg_dumpall"), "--globals-only", "--no-role-passwords", "--no-password"]
    stall = postgres.stall(postgres.maintenance_database)
    shell.run([*argv, f"--file={path}"], environment=postgres.environment(), stall=stall)
    return path


def carries_statistics(postgres: Postgres) -> bool:
    """Whether these programs can dump planner statistics (18 and later)."""
    return program_version(postgres, "pg_dump") * 10000 >= STATISTICS_VERSION


def _options(postgres: Postgres, what: What, jobs: int, *, built_in: bool) -> list[str]:
    if what.form in ("sql", "sql.gz"):
        return ["--format=plain", "-b", *(["--compress=6"] if what.form == "sql.gz" else [])]
    directory = ["--format=directory", f"--compress={ZSTD if built_in else 0}"]
    if what.form == "schema":
        return [*directory, "--schema-only"]
    if what.form == "tables":
        names = [f"{_pattern(schema)}.{_pattern(table)}" for schema, table in what.others]
        return [*directory, f"--jobs={jobs}", "--no-blobs", *(f"--exclude-table-data={name}" for name in names)]
    statistics = ["--statistics"] if carries_statistics(postgres) else []
    return [*directory, f"--jobs={jobs}", "-b", *statistics]


def _pattern(name: str) -> str:
    """A name quoted for pg_dump's patterns, so that it matches literally."""
    return '"' + name.replace('"', '""') + '"'


def _in_snapshot(snapshot: str) -> list[str]:
    return [f"--snapshot={snapshot}", f"--lock-wait-timeout={LOCK_WAIT}"]


def _weights(exporter: Connection, what: What) -> Weights:
    return Weights({}, 0) if what.part == "schema" else weights_of(exporter, what.others, all_=what.part == "full")


def _pg_dump(
    postgres: Postgres, target: Path, options: Sequence[str], done: DumpProgress, behind: int
) -> tuple[float, Compressing]:
    """The seconds, and the result of the compression in `behind` threads; 0: pg_dump compresses, or nothing does."""
    if behind:
        with progress(done.read), compressing(target, behind, NICE) as packed:
            seconds = _run_pg_dump(postgres, target, options)
        return seconds, packed
    with progress(done.read):
        return _run_pg_dump(postgres, target, options), Compressing(target)


def _run_pg_dump(postgres: Postgres, target: Path, options: Sequence[str]) -> float:
    argv = [postgres.program("pg_dump"), *options, "--no-sync", "--no-password", "--file", str(target)]
    environment = {**postgres.environment(options="-c lc_messages=C"), "PGDATABASE": postgres.database}
    with _translating(postgres):
        try:
            return shell.run(
                argv, environment=environment, nice=NICE, stall=postgres.stall(), hint="nothing was published"
            ).seconds
        except CommandFailed as error:
            if _ENDED in error.stderr:
                raise Unreachable("PostgreSQL ended pg_dump's session at its start", _AGAIN) from None
            if (free := disk_of(target).free_bytes) < FULL_BYTES:  # pg_dump's own message does not name the cause
                hint = f"free disk space at {target.parents[1]}"
                raise OpsError(f"the store is full: {size(free)} free", hint) from None
            raise


@contextmanager
def _translating(postgres: Postgres) -> Iterator[None]:
    try:
        yield
    except CommandFailed as error:
        # pg_dump's own --lock-wait-timeout is a statement_timeout around LOCK TABLE; it sets none otherwise.
        if re.search(r"could not obtain lock|lock timeout|55P03|due to statement timeout", error.stderr):
            raise _Contended("a table was truncated or altered") from None
        if dropped := _DROPPED.search(error.stderr):
            raise _Contended(f"an object was dropped ({dropped[0]})") from None
        if "out of shared memory" in error.stderr:
            raise too_many_tables(postgres) from None
        raise
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject, psycopg.errors.UndefinedFunction) as error:
        raise _Contended(f"an object was dropped ({first_line(error)})") from None
    except psycopg.errors.OutOfMemory as error:
        raise (too_many_tables(postgres) if "shared memory" in str(error) else error) from None


# The server's messages about an object that is in pg_dump's snapshot but no longer in the system catalogs.
_DROPPED = re.compile(
    r"could not open relation with OID|cache lookup failed for|(?:relation|schema|function|type) .* does not exist"
)
