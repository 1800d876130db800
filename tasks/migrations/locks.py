"""The locks that a migration takes, recorded by event triggers in a scratch database.

The triggers fire at the end of each DDL statement, before a rewrite, and when Alembic stores a revision. Locks are held
until the transaction ends, so none is missed; sampling from outside would miss some.
https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES
https://www.postgresql.org/docs/current/event-trigger-definition.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute
from tasks.postgres.upkeep.session import upkeep_session

SCHEMA = "ops_rehearsal"
# The modes that block writes; ACCESS EXCLUSIVE also blocks reads.
MODES = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")
WORDS = {
    "ShareLock": "SHARE",
    "ShareRowExclusiveLock": "SHARE ROW EXCLUSIVE",
    "ExclusiveLock": "EXCLUSIVE",
    "AccessExclusiveLock": "ACCESS EXCLUSIVE",
}
REWRITE = "rewrite"


@dataclass(frozen=True)
class HeldTableLock:
    """The strongest lock that a migration takes on an existing table.

    `seconds`: how long it is held on the otherwise idle copy, to the end of its transaction. `bytes` and `rows`: of the
    live table with its partitions.
    """

    revision: str
    table: str
    mode: str
    seconds: float
    rewrites: bool
    bytes: int
    rows: int

    @property
    def blocks(self) -> str:
        """The operations of others that it blocks."""
        return "reads and writes" if self.mode == WORDS["AccessExclusiveLock"] else "writes"

    def __str__(self) -> str:
        rewritten = ", rewriting it" if self.rewrites else ""
        return f"{self.revision}: {self.mode} on {self.table} ({self.rows:,} rows) for {self.seconds:.1f} s{rewritten}"


@dataclass(frozen=True)
class Watched:
    """The record: locks, (revision, seconds) of each migration, and revisions that run without a lock_timeout.

    Not `complete`: this login cannot create event triggers, so nothing was recorded.
    """

    locks: tuple[HeldTableLock, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    unlimited: tuple[str, ...] = ()
    complete: bool = True


def install(connection: Connection, role: str) -> bool:
    """Start recording in a scratch database; False if this login lacks the privilege."""
    try:
        with connection.transaction():
            if not execute(connection, "SELECT to_regclass('public.alembic_version')")[0][0]:
                connection.execute(_VERSION)  # as Alembic creates it, to separate the first migrations too
                connection.execute(
                    sql.SQL("ALTER TABLE public.alembic_version OWNER TO {}").format(sql.Identifier(role))
                )
            connection.execute(_INSTALL)
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


def remove(connection: Connection) -> None:
    """Stop recording and remove the triggers."""
    with connection.transaction():
        connection.execute("DROP EVENT TRIGGER IF EXISTS ops_rehearsal_ddl")
        connection.execute("DROP EVENT TRIGGER IF EXISTS ops_rehearsal_rewrite")
        connection.execute("DROP SCHEMA IF EXISTS ops_rehearsal CASCADE")  # and the trigger on alembic_version


def read(connection: Connection, direction: Literal["up", "down"], live: Mapping[str, tuple[int, int]]) -> Watched:
    """The record. `live`: bytes and rows of the live tables."""
    locks: dict[tuple[str, str], HeldTableLock] = {}
    for _, old, new, table, mode, held, size, rows in execute(connection, _LOCKS):
        revision = str((old if direction == "down" else new) or "?")
        before = locks.get((revision, table))
        size, rows = (max(pair) for pair in zip((int(size), int(rows)), live.get(table, (0, 0)), strict=True))
        modes = [WORDS.get(mode, WORDS["AccessExclusiveLock"]), *([before.mode] if before else [])]
        locks[(revision, table)] = HeldTableLock(
            revision,
            table,
            max(modes, key=list(WORDS.values()).index),
            max(float(held), before.seconds if before else 0.0),
            mode == REWRITE or bool(before and before.rewrites),
            size,
            rows,
        )
    marks = [
        (str((old if direction == "down" else new) or "?"), float(seconds), bool(waits))
        for old, new, seconds, waits in execute(connection, _MARKS)
    ]
    return Watched(
        tuple(locks.values()),
        tuple((revision, seconds) for revision, seconds, _ in marks),
        tuple(revision for revision, _, waits in marks if waits),
    )


def table_sizes(postgres: Postgres) -> Mapping[str, tuple[int, int]]:
    """Bytes and estimated rows of every live table, with its partitions.

    Raises:
        OpsError: another session holds an exclusive lock on one.
    """
    with upkeep_session(postgres) as connection:
        return {str(name): (int(size), int(rows)) for _, name, size, rows in execute(connection, _RELATIONS)}


_RELATIONS = """
SELECT c.oid, format('%I.%I', n.nspname, c.relname) AS name,
       (SELECT coalesce(sum(pg_total_relation_size(t.relid)), 0) FROM (
            SELECT relid FROM pg_partition_tree(c.oid) UNION SELECT c.oid) t)::bigint AS bytes,
       (SELECT coalesce(sum(greatest(leaf.reltuples, 0)), 0) FROM (
            SELECT relid FROM pg_partition_tree(c.oid) UNION SELECT c.oid) t
        JOIN pg_class leaf ON leaf.oid = t.relid AND leaf.relkind <> 'p')::bigint AS rows
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm') AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""

_VERSION = """
CREATE TABLE public.alembic_version (
    version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))
"""

# SECURITY DEFINER: the application's role migrates but cannot write here. ALWAYS: also with session_replication_role.
_INSTALL = sql.SQL(
    """
CREATE SCHEMA ops_rehearsal;
CREATE TABLE ops_rehearsal.relation AS SELECT * FROM ({relations}) r WHERE name <> 'public.alembic_version';
ALTER TABLE ops_rehearsal.relation ADD PRIMARY KEY (oid);
CREATE TABLE ops_rehearsal.event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, xact bigint NOT NULL DEFAULT txid_current(),
    began timestamptz NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    relation oid, mode text, marks boolean NOT NULL DEFAULT false, old text, new text,
    waits boolean NOT NULL DEFAULT current_setting('lock_timeout') = '0');

CREATE FUNCTION ops_rehearsal.note(began timestamptz) RETURNS void LANGUAGE sql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO ops_rehearsal.event (began, relation, mode)
    SELECT DISTINCT note.began, l.relation, l.mode FROM pg_locks l
    JOIN ops_rehearsal.relation r ON r.oid = l.relation
    WHERE l.locktype = 'relation' AND l.granted AND l.pid = pg_backend_pid() AND l.mode = ANY ({modes})
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND NOT EXISTS (SELECT FROM ops_rehearsal.event e
                      WHERE e.xact = txid_current() AND e.relation = l.relation AND e.mode = l.mode)
$$;

CREATE FUNCTION ops_rehearsal.on_ddl() RETURNS event_trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ops_rehearsal.note(statement_timestamp());
END $$;

CREATE FUNCTION ops_rehearsal.on_rewrite() RETURNS event_trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO ops_rehearsal.event (began, relation, mode)
    SELECT statement_timestamp(), oid, 'rewrite' FROM ops_rehearsal.relation
    WHERE oid = pg_event_trigger_table_rewrite_oid();
END $$;

CREATE FUNCTION ops_rehearsal.on_revision() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM ops_rehearsal.note(  -- taken without DDL (TRUNCATE, LOCK TABLE), at any time since the last event
        coalesce((SELECT max(at) FROM ops_rehearsal.event WHERE xact = txid_current()), transaction_timestamp()));
    INSERT INTO ops_rehearsal.event (began, marks, old, new) VALUES (
        transaction_timestamp(), true, CASE WHEN TG_OP <> 'INSERT' THEN OLD.version_num END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.version_num END);
    RETURN NULL;
END $$;

CREATE TRIGGER ops_rehearsal AFTER INSERT OR UPDATE OR DELETE ON public.alembic_version
FOR EACH ROW EXECUTE FUNCTION ops_rehearsal.on_revision();
ALTER TABLE public.alembic_version ENABLE ALWAYS TRIGGER ops_rehearsal;
CREATE EVENT TRIGGER ops_rehearsal_ddl ON ddl_command_end EXECUTE FUNCTION ops_rehearsal.on_ddl();
ALTER EVENT TRIGGER ops_rehearsal_ddl ENABLE ALWAYS;
CREATE EVENT TRIGGER ops_rehearsal_rewrite ON table_rewrite EXECUTE FUNCTION ops_rehearsal.on_rewrite();
ALTER EVENT TRIGGER ops_rehearsal_rewrite ENABLE ALWAYS;
"""
).format(relations=sql.SQL(_RELATIONS), modes=sql.Literal(list(MODES)))

# A lock belongs to the revision stored next, and is held until the last event of its transaction.
_LOCKS = """
SELECT e.id, m.old, m.new, r.name, e.mode,
       greatest(extract(epoch FROM (SELECT max(o.at) FROM ops_rehearsal.event o WHERE o.xact = e.xact) - e.began), 0),
       r.bytes, r.rows
FROM ops_rehearsal.event e JOIN ops_rehearsal.relation r ON r.oid = e.relation
LEFT JOIN LATERAL (
    SELECT old, new FROM ops_rehearsal.event m WHERE m.marks AND m.id > e.id ORDER BY m.id LIMIT 1) m ON true
ORDER BY e.id
"""

_MARKS = """
SELECT old, new, greatest(extract(epoch FROM at - coalesce(lag(at) OVER (ORDER BY id), began)), 0),
       EXISTS (SELECT FROM ops_rehearsal.event e WHERE e.waits AND e.id <= m.id AND e.id > coalesce(
           (SELECT max(o.id) FROM ops_rehearsal.event o WHERE o.marks AND o.id < m.id), 0))
FROM ops_rehearsal.event m WHERE marks ORDER BY id
"""
