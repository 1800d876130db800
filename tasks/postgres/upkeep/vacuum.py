"""VACUUM and ANALYZE, table by table, and the tables' statistics."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, LiteralString

import psycopg
from psycopg import errors, sql

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from tasks.postgres.upkeep.session import as_ops_error, done_of, upkeep_session

REWRITE = "rewrite table"
# Above this age PostgreSQL refuses to write: 2³¹ transactions minus a reserve of three million.
WRAPAROUND_XIDS = 2_144_483_647

Mode = Literal["plain", "analyze", "plain_analyze", "full"]
_COMMANDS: dict[Mode, LiteralString] = {
    "plain": "VACUUM {}",
    "analyze": "ANALYZE {}",
    "plain_analyze": "VACUUM (ANALYZE) {}",
    "full": "VACUUM (FULL, ANALYZE) {}",
}
# Without the option each table's VACUUM also reads all of pg_class, for the age of the database.
# https://www.postgresql.org/docs/current/sql-vacuum.html
_SKIPS_FROM = 160000
_SKIPPING: dict[Mode, LiteralString] = {
    "plain": "VACUUM (SKIP_DATABASE_STATS) {}",
    "plain_analyze": "VACUUM (SKIP_DATABASE_STATS, ANALYZE) {}",
}
_DATABASE: LiteralString = "VACUUM (ONLY_DATABASE_STATS)"
_ANALYZES_ONLY_FROM = 180000


@dataclass(frozen=True)
class VacuumTable:
    """Statistics of a table or materialised view. `dead` and `live`: PostgreSQL's estimates of rows.

    After a vacuum `dead` counts the rows that it could not remove. `xids`: age of the oldest unfrozen row.
    """

    oid: int
    name: str
    schema: str
    relation: str
    parent: bool
    system: bool
    live: int
    dead: int
    heap_bytes: int
    total_bytes: int
    xids: int
    tablespace: str

    @property
    def dead_ratio(self) -> float:
        """Dead rows of all rows, 0 for an empty table."""
        return self.dead / max(self.dead + self.live, 1)


@dataclass(frozen=True)
class Vacuumed:
    """The result for one table: seconds, the failure, and PostgreSQL's warnings."""

    name: str
    seconds: float
    failed: str = ""
    warned: str = ""
    hint: str = ""


@probe
def read_tables(postgres: Postgres) -> tuple[VacuumTable, ...]:
    """Every table of the application's database, with system tables and partitioned parents, largest first.

    Raises:
        OpsError: another session holds an exclusive lock on a table.
    """
    with upkeep_session(postgres) as connection:
        return tuple(
            VacuumTable(
                int(oid),
                name,
                schema,
                relation,
                kind == "p",
                bool(system),
                int(live),
                int(dead),
                int(heap),
                int(total),
                int(xids),
                str(tablespace),
            )
            for oid, name, schema, relation, kind, system, live, dead, heap, total, xids, tablespace in execute(
                connection, _TABLES
            )
        )


_TABLES = """
SELECT c.oid, format('%I.%I', n.nspname, c.relname), n.nspname, c.relname, c.relkind,
       n.nspname IN ('pg_catalog', 'information_schema'),
       pg_stat_get_live_tuples(c.oid), pg_stat_get_dead_tuples(c.oid),
       coalesce(pg_table_size(c.oid), 0), coalesce(pg_total_relation_size(c.oid), 0),
       CASE WHEN c.relkind = 'p' THEN 0 ELSE greatest(age(c.relfrozenxid), age(t.relfrozenxid)) END,
       coalesce(pg_tablespace_location(nullif(c.reltablespace, 0)), '')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
WHERE c.relkind IN ('r', 'm', 'p') AND c.relpersistence <> 't' AND n.nspname <> 'pg_toast'
ORDER BY 10 DESC, 2
"""


@action
def vacuum_tables(
    postgres: Postgres, tables: Sequence[VacuumTable], mode: Mode, jobs: int, *, whole: bool = False
) -> tuple[Vacuumed, ...]:
    """VACUUM and/or ANALYZE each table, `jobs` at a time. A locked table is skipped and reported. `whole`: these are
    all tables of the database, so a partitioned one is analysed without its partitions, where the server can.

    Raises:
        Unreachable: the server stopped.
        OpsError: somebody cancelled it.
    """
    if mode == "full":
        raise OpsError("VACUUM FULL needs a permit", "call rewrite_table")
    return _run(postgres, tables, mode, jobs, whole=whole)


@action(of=lambda table: Act(REWRITE, table.name))
def rewrite_table(postgres: Postgres, table: VacuumTable) -> Vacuumed:
    """VACUUM FULL: it blocks reads and writes of the table while it rewrites it.

    Raises:
        Unreachable, OpsError.
    """
    return _run(postgres, [table], "full", 1)[0]


def _run(
    postgres: Postgres, tables: Sequence[VacuumTable], mode: Mode, jobs: int, *, whole: bool = False
) -> tuple[Vacuumed, ...]:
    waiting = iter(tables)
    taking = threading.Lock()
    sessions: list[Connection] = []
    finished: list[VacuumTable] = []

    def take() -> VacuumTable | None:
        with taking:
            return next(waiting, None)

    def work() -> list[Vacuumed]:
        with upkeep_session(postgres) as connection:
            sessions.append(connection)
            done = []
            for table in iter(take, None):
                command = _command(connection.info.server_version, table, mode, whole=whole)
                done.append(_vacuum(connection, table, command))
                finished.append(table)
            return done

    workers = max(1, min(jobs, len(tables)))
    with (
        progress(lambda: read_progress(postgres, len(finished), len(tables))),
        ThreadPoolExecutor(workers, thread_name_prefix="vacuum") as pool,
    ):
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            done = tuple(done for future in futures for done in future.result())
            _update_database(postgres, mode)
            return done
        except BaseException:
            _stop(waiting, sessions)  # leave nothing running in the server
            raise


def _stop(waiting: Iterator[VacuumTable], sessions: list[Connection]) -> None:
    for _ in waiting:
        pass
    for connection in sessions:
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=5)


def _command(version: int, table: VacuumTable, mode: Mode, *, whole: bool) -> sql.Composed:
    name = sql.Identifier(table.schema, table.relation)
    if table.parent:
        only = whole and version >= _ANALYZES_ONLY_FROM
        return sql.SQL("ANALYZE ONLY {}" if only else "ANALYZE {}").format(name)
    return sql.SQL((_SKIPPING if version >= _SKIPS_FROM else {}).get(mode, _COMMANDS[mode])).format(name)


def _update_database(postgres: Postgres, mode: Mode) -> None:
    """The database's own age, once for all tables."""
    if mode in _SKIPPING:
        with upkeep_session(postgres) as connection:
            if connection.info.server_version >= _SKIPS_FROM:
                connection.execute(_DATABASE)


def _vacuum(connection: Connection, table: VacuumTable, command: sql.Composed) -> Vacuumed:
    skipped: list[str] = []  # without the privilege PostgreSQL skips a table with a warning and succeeds
    warned: list[str] = []
    hints: list[str] = []

    def collect(notice: errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            text = notice.message_primary or ""
            (skipped if _SKIPPED.search(text) else warned).append(text)
            hints.append(notice.message_hint or "")

    connection.add_notice_handler(collect)
    started = time.monotonic()
    try:
        connection.execute(command)
    except (errors.QueryCanceled, errors.AdminShutdown):
        raise
    except errors.UndefinedTable:
        return Vacuumed(table.name, 0, "it was dropped meanwhile", hint="nothing to do")
    except psycopg.Error as error:
        if connection.broken:
            raise
        failed = as_ops_error(error)
        return Vacuumed(table.name, time.monotonic() - started, failed.message, hint=failed.hint)
    finally:
        connection.remove_notice_handler(collect)
    hint = "log in as the table's owner or a superuser" if skipped else "; ".join(dict.fromkeys(filter(None, hints)))
    return Vacuumed(table.name, time.monotonic() - started, "; ".join(skipped), "; ".join(warned), hint)


# These warnings have no specific SQLSTATE; with lc_messages=ja_JP they are in Japanese.
_SKIPPED = re.compile("skipping|スキップ")


def read_progress(postgres: Postgres, finished: int, tables: int) -> WorkDone:
    """The progress in this database: finished tables, and the current ones."""
    with upkeep_session(postgres, 1) as connection:
        rows = execute(connection, _PROGRESS)
    current = done_of(rows)
    ratio = (finished + len(rows) * current.ratio) / max(tables, 1)
    return WorkDone(f"{finished} of {tables} tables done; {current}", ratio)


_PROGRESS = """
SELECT coalesce(c.relname, p.relid::text), p.phase, p.done * b.bytes, p.whole * b.bytes
FROM (SELECT datname, relid, phase, heap_blks_scanned AS done, heap_blks_total AS whole FROM pg_stat_progress_vacuum
      UNION ALL
      SELECT datname, relid, phase, heap_blks_scanned, heap_blks_total FROM pg_stat_progress_cluster) AS p
     LEFT JOIN pg_class c ON c.oid = p.relid, (SELECT current_setting('block_size')::bigint AS bytes) AS b
WHERE p.datname = current_database()
"""
