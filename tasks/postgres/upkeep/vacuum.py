"""VACUUM and ANALYZE, table by table, and what they are measured by."""

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
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.progress import Done, progress
from tasks.postgres.upkeep.session import as_ops_error, done_of, upkeep_session

REWRITE = "rewrite table"
# Beyond this age PostgreSQL refuses to write: 2³¹ transactions, less the three million it keeps back.
WRAPAROUND_XIDS = 2_144_483_647

Mode = Literal["plain", "analyze", "plain_analyze", "full"]
_COMMANDS: dict[Mode, LiteralString] = {
    "plain": "VACUUM {}",
    "analyze": "ANALYZE {}",
    "plain_analyze": "VACUUM (ANALYZE) {}",
    "full": "VACUUM (FULL, ANALYZE) {}",
}


@dataclass(frozen=True)
class Table:
    """A table (or materialised view) as statistics see it. `dead` and `live` are PostgreSQL's estimates of rows.

    After a vacuum `dead` is what it counted and could not remove. `xids` is the age of its oldest unfrozen row.
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
    """What became of one table: its seconds, or why not; what PostgreSQL warned of where it did it."""

    name: str
    seconds: float
    failed: str = ""
    warned: str = ""
    hint: str = ""


@probe
def read_tables(postgres: Postgres) -> tuple[Table, ...]:
    """Every table of the application's database, the system's and partitioned parents too, biggest first.

    Raises:
        OpsError: somebody holds a table exclusively.
    """
    with upkeep_session(postgres) as connection:
        return tuple(
            Table(
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
def vacuum_tables(postgres: Postgres, tables: Sequence[Table], mode: Mode, jobs: int) -> tuple[Vacuumed, ...]:
    """VACUUM and/or ANALYZE each, `jobs` at a time. A table that is locked for long is passed over and told.

    Raises:
        Unreachable: the server went away.
        OpsError: somebody ended the work.
    """
    if mode == "full":
        raise OpsError("VACUUM FULL needs a permit", "call rewrite_tables")
    return _run(postgres, tables, mode, jobs)


@action
def rewrite_tables(permit: Permit, postgres: Postgres, tables: Sequence[Table]) -> tuple[Vacuumed, ...]:
    """VACUUM FULL, one after the other: each is locked against reading and writing while it is written anew.

    Raises:
        NotConfirmed, Unreachable, OpsError.
    """
    for table in tables:
        permit.require(REWRITE, table.name)
    return _run(postgres, tables, "full", 1)


def _run(postgres: Postgres, tables: Sequence[Table], mode: Mode, jobs: int) -> tuple[Vacuumed, ...]:
    waiting = iter(tables)
    taking = threading.Lock()
    sessions: list[Connection] = []
    finished: list[Table] = []

    def take() -> Table | None:
        with taking:
            return next(waiting, None)

    def work() -> list[Vacuumed]:
        with upkeep_session(postgres) as connection:
            sessions.append(connection)
            done = []
            for table in iter(take, None):
                done.append(_vacuum(connection, table, mode))
                finished.append(table)
            return done

    workers = max(1, min(jobs, len(tables)))
    with (
        progress(lambda: tell_progress(postgres, len(finished), len(tables))),
        ThreadPoolExecutor(workers, thread_name_prefix="vacuum") as pool,
    ):
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            return tuple(done for future in futures for done in future.result())
        except BaseException:
            _stop(waiting, sessions)  # a run that ends early leaves nothing running in the server
            raise


def _stop(waiting: Iterator[Table], sessions: list[Connection]) -> None:
    for _ in waiting:
        pass
    for connection in sessions:
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=5)


def _vacuum(connection: Connection, table: Table, mode: Mode) -> Vacuumed:
    skipped: list[str] = []  # without the right to it PostgreSQL skips a table with a warning, and succeeds
    warned: list[str] = []
    hints: list[str] = []

    def hear(notice: errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            said = notice.message_primary or ""
            (skipped if _SKIPPED.search(said) else warned).append(said)
            hints.append(notice.message_hint or "")

    connection.add_notice_handler(hear)
    started = time.monotonic()
    try:
        connection.execute(
            sql.SQL(_COMMANDS["analyze" if table.parent else mode]).format(sql.Identifier(table.schema, table.relation))
        )
    except (errors.QueryCanceled, errors.AdminShutdown):
        raise
    except errors.UndefinedTable:
        return Vacuumed(table.name, 0, "it was dropped meanwhile", hint="nothing: it is gone")
    except psycopg.Error as error:
        if connection.broken:
            raise
        told = as_ops_error(error)
        return Vacuumed(table.name, time.monotonic() - started, told.message, hint=told.hint)
    finally:
        connection.remove_notice_handler(hear)
    hint = "log in as the table's owner or a superuser" if skipped else "; ".join(dict.fromkeys(filter(None, hints)))
    return Vacuumed(table.name, time.monotonic() - started, "; ".join(skipped), "; ".join(warned), hint)


# PostgreSQL gives these no SQLSTATE of their own; a server with lc_messages=ja_JP says them in Japanese.
_SKIPPED = re.compile("skipping|スキップ")


def tell_progress(postgres: Postgres, finished: int, tables: int) -> Done:
    """How far the work in this database is: of all tables, and in those that are in hand."""
    with upkeep_session(postgres, 1) as connection:
        rows = execute(connection, _PROGRESS)
    in_hand = done_of(rows)
    ratio = (finished + len(rows) * in_hand.ratio) / max(tables, 1)
    return Done(f"{finished} of {tables} tables done; {in_hand}", ratio)


_PROGRESS = """
SELECT coalesce(c.relname, p.relid::text), p.phase, p.done * b.bytes, p.whole * b.bytes
FROM (SELECT datname, relid, phase, heap_blks_scanned AS done, heap_blks_total AS whole FROM pg_stat_progress_vacuum
      UNION ALL
      SELECT datname, relid, phase, heap_blks_scanned, heap_blks_total FROM pg_stat_progress_cluster) AS p
     LEFT JOIN pg_class c ON c.oid = p.relid, (SELECT current_setting('block_size')::bigint AS bytes) AS b
WHERE p.datname = current_database()
"""
