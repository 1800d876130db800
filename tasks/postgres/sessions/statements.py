"""Statements by their total time (pg_stat_statements), and the wait events of sessions.

https://www.postgresql.org/docs/current/pgstatstatements.html
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.masking import masked_statement

LIBRARY = "pg_stat_statements"
MOST, MOST_TEXT = 50, 300
SAMPLES, PAUSE_SECONDS = 20, 0.1
PRELOAD = (
    "add pg_stat_statements to shared_preload_libraries in postgresql.conf (Debian: package postgresql-contrib), "
    "restart the server in a maintenance window, then run CREATE EXTENSION pg_stat_statements as a superuser in this "
    "database"
)
CREATE = "run CREATE EXTENSION pg_stat_statements as a superuser in this database"


@dataclass(frozen=True)
class Statement:
    """One kind of statement without its constants. Times in milliseconds, the total in seconds."""

    text: str
    calls: int
    total_seconds: float
    mean_ms: float
    longest_ms: float
    rows: int
    read_blocks: int
    temporary_blocks: int
    share: float


@dataclass(frozen=True)
class Statements:
    """The statements of this database, the largest total first, counted `since`. `hidden`: texts that this login cannot
    read; `dropped`: entries evicted because of pg_stat_statements.max."""

    found: tuple[Statement, ...]
    since: str
    total_seconds: float
    hidden: int
    dropped: int


@probe
def read_statements(postgres: Postgres) -> Statements:
    """The statements of the environment's database. The view covers all databases of a server, so the extension can be
    in that database or in the maintenance database.

    Raises:
        Unreachable: the server does not answer.
        OpsError: the extension is in neither, or its library is not loaded; the hint says how to install it.
    """
    for database in (postgres.database, postgres.maintenance_database):
        with postgres.connect(database) as connection:
            if LIBRARY not in str(execute(connection, "SHOW shared_preload_libraries")[0][0]):
                raise OpsError(f"{LIBRARY} counts nothing: its library is not loaded", PRELOAD)
            if schema := execute(connection, _SCHEMA, LIBRARY):
                return _read(connection, str(schema[0][0]), postgres.database)
    raise OpsError(f"{LIBRARY} counts nothing: the extension is not in {postgres.database}", CREATE)


def _read(connection: Connection, schema: str, database: str) -> Statements:
    view = sql.Identifier(schema, LIBRARY)
    info = sql.Identifier(schema, f"{LIBRARY}_info")
    try:
        total = float(execute(connection, sql.SQL(_TOTAL).format(view=view), database)[0][0])
        since, dropped = execute(connection, sql.SQL(_INFO).format(info=info))[0]
        rows = execute(connection, sql.SQL(_STATEMENTS).format(view=view), database, MOST)
    except psycopg.Error as error:
        raise OpsError(f"{LIBRARY} cannot be read: {first_line(error)}", CREATE) from None
    hidden = sum(row[0] == "<insufficient privilege>" for row in rows)
    found = [
        Statement(
            masked_statement(text)[:MOST_TEXT],
            int(calls),
            seconds,
            mean,
            longest,
            int(count),
            int(read),
            int(temporary),
            seconds / total if total else 0.0,
        )
        for text, calls, seconds, mean, longest, count, read, temporary in rows
    ]
    return Statements(tuple(found), str(since), total, hidden, int(dropped))


_SCHEMA = """
SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = %s
"""
_OWN = "WHERE dbid = (SELECT oid FROM pg_database WHERE datname = %s)"
_TOTAL = f"SELECT coalesce(sum(total_exec_time), 0)::float8 / 1000 FROM {{view}} {_OWN}"  # noqa: S608
_INFO = "SELECT to_char(stats_reset AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'), dealloc FROM {info}"
_STATEMENTS = f"""
SELECT query, sum(calls), sum(total_exec_time)::float8 / 1000, (sum(total_exec_time) / sum(calls))::float8,
       max(max_exec_time)::float8, sum(rows), sum(shared_blks_read), sum(temp_blks_read + temp_blks_written)
FROM {{view}} {_OWN} AND calls > 0
GROUP BY queryid, query ORDER BY 3 DESC LIMIT %s
"""  # noqa: S608


@dataclass(frozen=True)
class Waits:
    """Wait events of busy sessions in some samples: `type: event` → share; CPU if they did not wait. `busy`: average
    number of busy sessions."""

    shares: tuple[tuple[str, float], ...]
    busy: float
    samples: int


@probe
def sample_waits(postgres: Postgres, samples: int = SAMPLES) -> Waits:
    """Sample the busy sessions of this database.

    Raises:
        Unreachable, OpsError: as `read_statements`.
    """
    counted = Counter[str]()
    with postgres.connect() as connection:
        for _ in range(samples):
            execute(connection, "SELECT pg_sleep(%s)", PAUSE_SECONDS)
            counted.update(str(event) for (event,) in execute(connection, _WAITS, postgres.database))
    total = counted.total()
    shares = tuple((event, count / total) for event, count in counted.most_common())
    return Waits(shares, total / samples, samples)


_WAITS = """
SELECT coalesce(wait_event_type || ': ' || wait_event, 'CPU') FROM pg_stat_activity
WHERE state = 'active' AND pid <> pg_backend_pid() AND datname = %s AND backend_type = 'client backend'
"""
