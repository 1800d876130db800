"""The live database while a migration runs on its copy: locks refuse what reaches it, and what it did is read.

The locks belong to one session. A run that is killed leaves none behind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import psycopg
from psycopg import sql

from blocks.postgres.refusals import CLOSED, NO_DATABASE, LoginRefused
from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError, Unreachable
from runbook.units import counted
from runbook.wait import until

LOCK_WAIT = "10s"
WATCH_SECONDS = 0.1
SETTLE_SECONDS, PATIENCE = 2.0, "5s"
REVISION_TABLES = (
    *("alembic_version", "django_migrations", "schema_migrations", "knex_migrations", "knex_migrations_lock"),
    *("directus_migrations", "strapi_migrations", "_prisma_migrations", "__drizzle_migrations", "sequelizemeta"),
    *("migrations", "pgmigrations", "mikro_orm_migrations", "flyway_schema_history", "schema_version"),
    *("databasechangelog", "databasechangeloglock", "goose_db_version", "gorp_migrations", "phinxlog"),
    *("atlas_schema_revisions", "doctrine_migration_versions", "__efmigrationshistory"),
)
"""Where migration tools note what they have done, most of them in the same transaction."""
# Not: ANALYZE's and large objects' catalogs, and those that all databases share.
_CATALOGS = """
SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' AND NOT relisshared
  AND relname !~ '^pg_(statistic|statistic_ext_data|largeobject.*)$'
  AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) ORDER BY 1
"""
_REVISIONS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't' AND lower(c.relname) = ANY(%s) ORDER BY 1, 2
"""
_SCHEMA = """
SELECT md5(string_agg(concat_ws(' ', c.oid, c.relname, a.attnum, a.attname, a.atttypid, a.attnotnull), ',' ORDER BY
                      c.oid, a.attnum))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""
_WRITTEN = "SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_user_tables"
_LATER = """
SELECT pid FROM pg_stat_activity
WHERE datname = %s AND backend_type = 'client backend' AND pid <> %s AND backend_start > %s
"""
# An older session may be a pooler's, which gave it to the migration: it is given time first.
_END_BLOCKED = """
WITH guard(name, pid, since, patience) AS (SELECT %s, %s::int, %s::timestamptz, %s::interval)
SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a JOIN guard ON a.datname = guard.name
WHERE a.backend_type = 'client backend' AND a.wait_event_type = 'Lock' AND guard.pid = ANY(pg_blocking_pids(a.pid))
  AND (a.backend_start > guard.since OR clock_timestamp() - a.query_start > guard.patience)
"""


@dataclass
class GuardedDatabase:
    """What happened in the live database meanwhile. `ended`: sessions that tried to change its schema or its tables of
    migrations; `changed`: its schema differs afterwards; `rows`: written ones, and those rolled back. `why`: why that
    is not known."""

    name: str
    ended: int = 0
    changed: bool = False
    rows: int = 0
    why: str = ""

    @property
    def is_unchanged(self) -> bool:
        """Whether it is known that nobody changed the database."""
        return not (self.why or self.changed or self.rows)

    @property
    def text(self) -> str:
        """What is known, as sentences."""
        ended = ""
        if self.ended:
            s = "was" if self.ended == 1 else "were"
            ended = f"; {counted(self.ended, 'session')} that tried to change it {s} ended"
        if self.why:
            return f"whether {self.name} was changed is unknown, because {self.why}{ended}"
        if self.changed:
            return f"the schema of {self.name} was changed{ended}"
        if self.rows:
            rows = f"at most {counted(self.rows, 'row')}, by the migration or by others"
            return f"the schema of {self.name} is unchanged; rows were written to it ({rows}){ended}"
        return f"{self.name} is unchanged: the same schema, and no row was written{ended}"


@contextmanager
def guarding(postgres: Postgres) -> Iterator[GuardedDatabase]:
    """Refuse every change of the live database's schema and of its tables of migrations in this block.

    Reads and writes of other tables go on. Sessions that wait for these locks are ended. If the administrator is no
    superuser, only the tables of migrations are locked. A database that cannot be guarded stops no recovery: `why`
    states it.
    """
    found = GuardedDatabase(postgres.database)
    try:
        session = postgres.connect(postgres.database)
    except OpsError as error:
        if not (isinstance(error, LoginRefused) and error.sqlstate in (NO_DATABASE, CLOSED)):  # which refuse everybody
            found.why = error.message
        yield found
        return
    with session:
        guard = _Guard(postgres, session, found)
        before = guard.lock()
        try:
            with guard.watching():
                yield found
        finally:
            guard.compare(before)


@dataclass
class _Guard:
    postgres: Postgres
    session: Connection
    found: GuardedDatabase
    since: datetime = field(default_factory=lambda: datetime.now(UTC))

    def lock(self) -> tuple[object, int]:
        """Take the locks and return the state. The transaction has no snapshot: it blocks no cleanup."""
        try:
            execute(self.session, "SELECT set_config('lock_timeout', %s, false)", LOCK_WAIT)
            execute(self.session, "BEGIN ISOLATION LEVEL READ COMMITTED")
            (self.since,) = execute(self.session, "SELECT clock_timestamp()")[0]
            names = [sql.Identifier("pg_catalog", name) for (name,) in execute(self.session, _CATALOGS)]
            names += [sql.Identifier(*row) for row in execute(self.session, _REVISIONS, list(REVISION_TABLES))]
            for name in names:
                execute(self.session, sql.SQL("LOCK TABLE {} IN SHARE MODE").format(name))
            return self.state()
        except psycopg.Error as error:
            self.found.why = f"it could not be guarded: {first_line(error)}"
            return None, 0

    def state(self) -> tuple[object, int]:
        """The schema's digest, and the written rows."""
        schema = execute(self.session, _SCHEMA)[0][0]
        execute(self.session, "SELECT pg_stat_clear_snapshot()")
        return schema, int(execute(self.session, _WRITTEN)[0][0])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """End sessions that wait for the guard's locks: a migration holds locks of its own, for which others wait."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(WATCH_SECONDS):
                with suppress(OpsError, psycopg.Error), self.postgres.connect() as connection:
                    while not done.wait(WATCH_SECONDS):
                        self.found.ended += len(execute(connection, _END_BLOCKED, *self._key))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def compare(self, before: tuple[object, int]) -> None:
        """Read what changed, once later sessions have ended: their statistics arrive with their end."""
        if self.found.why:
            return
        try:
            with self.postgres.connect() as connection, suppress(Unreachable):
                until(
                    lambda: not execute(connection, _LATER, *self._key[:3]),
                    what="the end of the sessions",
                    seconds=SETTLE_SECONDS,
                )
            after = self.state()
        except (OpsError, psycopg.Error) as error:
            self.found.why = first_line(error) if isinstance(error, psycopg.Error) else error.message
        else:
            self.found.changed, self.found.rows = after[0] != before[0], after[1] - before[1]

    @property
    def _key(self) -> tuple[object, ...]:
        return self.found.name, self.session.info.backend_pid, self.since, PATIENCE
