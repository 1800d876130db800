"""Planner statistics of a copy: without them the first queries can be ten thousand times slower."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook import shell
from runbook.kinds import action
from tasks.postgres.content.quiet import copy_options
from tasks.postgres.dump.dump import STATISTICS_VERSION
from tasks.postgres.upkeep.session import refusals


@dataclass(frozen=True)
class PlannerStatistics:
    """An analysed database. `missing`: parents of foreign tables that could not be analysed, with the reason."""

    database: str
    missing: tuple[str, ...] = ()


@action(idempotent=True)
def analyze(postgres: Postgres, database: str, jobs: int, *, everything: bool = False) -> PlannerStatistics:
    """Analyse a database. Since 18 a dump contains statistics, and only tables without them are analysed, unless
    `everything`.

    ANALYZE of a parent reads its foreign children; if their server is down, the parent has no statistics.
    """
    argv = [postgres.program("vacuumdb"), "--analyze-only", f"--jobs={jobs}", "--no-password", "--dbname", database]
    quiet = copy_options(postgres)
    with postgres.connect(database, options=quiet) as connection, refusals(connection):
        everything = everything or connection.info.server_version < STATISTICS_VERSION
        argv += [] if everything else ["--missing-stats-only"]
        remote = [sql.Identifier(*row) for row in execute(connection, _REMOTE)]
        tables = [sql.Identifier(*row) for row in execute(connection, _TABLES)] if remote else []
        near = [f"--table={table.as_string(connection)}" for table in tables if table not in remote]
        environment = postgres.environment(options=quiet)
        shell.run([*argv, *near], environment=environment, stall=postgres.stall(database))
        for parent in [sql.Identifier(*row) for row in execute(connection, _PARENTS)] if everything else []:
            if parent not in remote:
                connection.execute(sql.SQL("ANALYZE {}").format(parent))
        missing = tuple(filter(None, (_analyze_remote(connection, parent) for parent in remote)))
    return PlannerStatistics(database, missing)


def _analyze_remote(connection: Connection, parent: sql.Identifier) -> str:
    """Analyse a parent of foreign tables; returns the error, if any."""
    try:
        connection.execute(sql.SQL("ANALYZE {}").format(parent))
    except psycopg.Error as error:
        if connection.broken:
            raise
        return f"{parent.as_string(connection)}: {first_line(error)}"
    return ""


_REMOTE = """
WITH RECURSIVE above(oid) AS (
    SELECT i.inhparent FROM pg_inherits i JOIN pg_class f ON f.oid = i.inhrelid AND f.relkind = 'f'
    UNION SELECT i.inhparent FROM above JOIN pg_inherits i ON i.inhrelid = above.oid)
SELECT n.nspname, c.relname FROM above JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY 1, 2
"""
_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_toast'
"""
# vacuumdb skips partitioned parents.
_PARENTS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'p' AND NOT c.relispartition
"""
