"""amcheck: check every heap page, B-tree and GIN index (amcheck 1.5 of version 18 or later) of a database.

The functions used here work on a standby too: bt_index_check, gin_index_check and verify_heapam lock like a SELECT.
bt_index_parent_check is not used: it blocks writers on a primary. So links between index levels are not checked.

https://www.postgresql.org/docs/current/amcheck.html
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psycopg
from psycopg import sql

from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from runbook.wait import until
from tasks.postgres.upkeep.visibility import lost_end

LOCK_WAIT_MS = 5000
MOST_MESSAGES = 5
# data_corrupted, index_corrupted, internal_error; class 58: a file is missing or unreadable.
DAMAGE = ("XX000", "XX001", "XX002", "58030", "58P01", "58000")

CATALOGUE_HINT = (
    "keep a copy of the server's files, check disk and memory of its host, then restore-database (or promote a standby "
    "that is intact). If only a system index is damaged, run REINDEX SYSTEM by hand in a maintenance window"
)

Outcome = Literal["intact", "damaged", "not reached", "not checked"]


@dataclass(frozen=True)
class AmcheckRelation:
    """A heap, or an index of an access `method`; `table`: its table. `why_not`: why amcheck cannot check it, empty if
    it can. `is_unindexed`: a heap without a B-tree index."""

    oid: int
    name: str
    table: str
    is_index: bool
    bytes: int
    why_not: str
    method: str = ""
    is_unindexed: bool = False


@dataclass(frozen=True)
class CheckedRelation:
    """The result for one relation."""

    relation: AmcheckRelation
    outcome: Outcome
    seconds: float
    message: str = ""


@probe
def find_relations(postgres: Postgres, database: str, tables: Sequence[str]) -> tuple[AmcheckRelation, ...]:
    """Heaps (with TOAST) and indexes of the named tables (`table` or `schema.table`, with their partitions) or of all
    tables: system catalogs first, then by size.

    Raises:
        Unreachable: the server is down.
        OpsError: there is no such database or table, or the system catalogs are damaged.
    """
    with postgres.connect(database) as connection, _catalogue(database):
        found = execute(connection, _NAMED, list(tables))
        missing = set(tables) - {str(name) for row in found for name in (row[1], f"{row[2]}.{row[1]}")}
        if missing:
            names = ", ".join(sorted(missing))
            raise OpsError(f"there is no table {names} in {database}", "enter table or schema.table, in exact case")
        rows = execute(connection, _RELATIONS, not tables, [row[0] for row in found])
    return tuple(
        AmcheckRelation(int(r[0]), str(r[1]), str(r[2]), bool(r[3]), int(r[4]), str(r[5]), str(r[6]), bool(r[7]))
        for r in rows
    )


@contextmanager
def _catalogue(database: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate not in DAMAGE:
            raise
        raise OpsError(
            f"the system catalogs of {database} are damaged, its tables cannot be listed: {first_line(error)}",
            CATALOGUE_HINT,
        ) from None


_NAMED = """
SELECT coalesce(p.relid, c.oid)::oid, c.relname::text, n.nspname::text
FROM (SELECT %s::text[] AS list) AS names, pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     LEFT JOIN LATERAL pg_partition_tree(c.oid) p ON true
WHERE c.relkind IN ('r', 'm', 'p')
  AND (c.relname = ANY (names.list) OR n.nspname || '.' || c.relname = ANY (names.list))
"""
_RELATIONS = """
WITH heap AS (
    SELECT c.oid, c.oid AS owner FROM pg_class c WHERE c.relkind IN ('r', 'm') AND (%s OR c.oid = ANY (%s::oid[]))
), whole AS (
    SELECT oid, owner FROM heap
    UNION ALL SELECT c.reltoastrelid, heap.owner FROM heap JOIN pg_class c USING (oid) WHERE c.reltoastrelid <> 0
), every AS (
    SELECT oid, owner FROM whole
    UNION ALL SELECT i.indexrelid, whole.owner FROM whole JOIN pg_index i ON i.indrelid = whole.oid
)
SELECT c.oid, format('%%I.%%I', n.nspname, c.relname), every.owner::regclass::text, c.relkind = 'i',
       c.relpages * current_setting('block_size')::bigint,
       CASE WHEN c.relpersistence = 't' THEN 'temporary'
            WHEN c.relpersistence = 'u' AND pg_is_in_recovery() THEN 'unlogged, empty on a standby'
            WHEN c.relkind = 'i' AND NOT i.indisvalid THEN 'the index is invalid: rebuild or drop it'
            WHEN c.relkind = 'i' AND NOT i.indisready THEN 'the index is not ready'
            WHEN a.amname = 'gin' AND gin.known THEN ''
            WHEN a.amname = 'gin' AND gin.available >= 1.5 THEN
                 'this amcheck has no check for gin: ALTER EXTENSION amcheck UPDATE'
            WHEN a.amname NOT IN ('heap', 'btree') THEN 'amcheck has no check for ' || a.amname
            ELSE '' END,
       a.amname,
       c.relkind IN ('r', 'm') AND NOT EXISTS (
           SELECT FROM pg_index x JOIN pg_class xc ON xc.oid = x.indexrelid JOIN pg_am xa ON xa.oid = xc.relam
           WHERE x.indrelid = c.oid AND x.indisvalid AND x.indpred IS NULL AND x.indexprs IS NULL
             AND xa.amname = 'btree')
FROM (SELECT EXISTS (SELECT FROM pg_proc WHERE proname = 'gin_index_check' AND pronamespace =
                     (SELECT extnamespace FROM pg_extension WHERE extname = 'amcheck')) AS known,
             (SELECT default_version::numeric FROM pg_available_extensions WHERE name = 'amcheck') AS available) AS gin,
     every JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am a ON a.oid = c.relam
     LEFT JOIN pg_index i ON i.indexrelid = c.oid
ORDER BY every.owner >= 16384, c.relpages, c.oid
"""


@probe
def check_relations(
    postgres: Postgres,
    database: str,
    schema: str,
    relations: Sequence[AmcheckRelation],
    heapallindexed: bool,
    seconds: float,
) -> tuple[CheckedRelation, ...]:
    """Check one relation after the other, each in its own transaction, until `seconds` are used up.

    The snapshot of each transaction holds xmin back while it runs.

    Raises:
        Unreachable: the server is down.
    """
    checked: list[CheckedRelation] = []
    end = time.monotonic() + seconds

    def done() -> WorkDone:
        return WorkDone(f"{len(checked)} of {len(relations)} checked", len(checked) / max(len(relations), 1))

    with _session(postgres, database) as connection, progress(done):
        for relation in relations:
            left = end - time.monotonic()
            if relation.why_not:
                checked.append(CheckedRelation(relation, "not checked", 0, relation.why_not))
            elif connection.broken:
                checked.append(CheckedRelation(relation, "not checked", 0, "the server had ended the session"))
            elif left <= 0:
                checked.append(CheckedRelation(relation, "not reached", 0, "the time budget was used up"))
            else:
                checked.append(_check(connection, schema, relation, heapallindexed, left))
    return tuple(checked)


@contextmanager
def _session(postgres: Postgres, database: str) -> Iterator[Connection]:
    """A read-only session with a short lock timeout, which detects damage even if the server's settings hide it."""
    with postgres.connect(database) as connection:
        execute(connection, "SET default_transaction_read_only = on")
        execute(connection, "SELECT set_config('lock_timeout', %s, false)", str(LOCK_WAIT_MS))
        execute(connection, "SET search_path = ''")
        execute(connection, _SEE)
        yield connection


_SEE = """
SELECT set_config(name, 'off', false) FROM pg_settings
WHERE name IN ('zero_damaged_pages', 'ignore_checksum_failure') AND setting = 'on'
"""


def _check(
    connection: Connection, schema: str, relation: AmcheckRelation, heapallindexed: bool, left: float
) -> CheckedRelation:
    started = time.monotonic()
    outcome: Outcome = "intact"
    try:
        longest = str(math.ceil(left * 1000) + 1)  # not a moment before the time is used up
        execute(connection, "SELECT set_config('statement_timeout', %s, false)", longest)
        message = _run_amcheck(connection, schema, relation, heapallindexed)
        outcome = "damaged" if message else "intact"
    except psycopg.Error as error:
        outcome, message = _classify(connection, relation, error)
    return CheckedRelation(relation, outcome, time.monotonic() - started, " ".join(message.split()))


def _run_amcheck(connection: Connection, schema: str, relation: AmcheckRelation, heapallindexed: bool) -> str:
    if relation.method == "gin":
        statement = sql.SQL("SELECT {}.gin_index_check(%s::oid::regclass)").format(sql.Identifier(schema))
        execute(connection, statement, relation.oid)
        return ""
    if relation.is_index:
        statement = sql.SQL("SELECT {}.bt_index_check(%s::oid::regclass, %s)").format(sql.Identifier(schema))
        execute(connection, statement, relation.oid, heapallindexed)
        return ""
    statement = sql.SQL(
        "SELECT blkno, offnum, msg, count(*) OVER () FROM {}.verify_heapam(%s::oid::regclass, check_toast => true) "
        "LIMIT %s"
    ).format(sql.Identifier(schema))
    rows = execute(connection, statement, relation.oid, MOST_MESSAGES)
    found = "; ".join(f"block {row[0]}" + (f" row {row[1]}" if row[1] else "") + f": {row[2]}" for row in rows)
    if not rows:
        if lost := lost_end(connection, relation.oid):
            return lost
        _read_rows_of_index(connection, relation, heapallindexed)
    return f"{rows[0][3]} errors: {found}" if rows else ""


def _read_rows_of_index(connection: Connection, relation: AmcheckRelation, always: bool) -> None:
    """Read the rows of an index if the file has fewer pages than pg_class counts, or `always`.

    verify_heapam reads the existing pages and does not detect a truncated file. pg_class's count can be old, for
    example after a restore.

    Raises:
        psycopg.Error: a row's page is missing.
    """
    rows = execute(connection, _SHORT, relation.oid, always, relation.oid)
    if not rows:
        return
    schema, table, key = rows[0]
    with connection.transaction(force_rollback=True):
        execute(connection, _BY_INDEX)
        name = sql.Identifier(schema, table)
        statement = sql.SQL("SELECT count(*) FROM (SELECT ctid FROM ONLY {} ORDER BY {} OFFSET 0) AS rows")
        execute(connection, statement.format(name, sql.SQL(key)))


_BY_INDEX = """
SELECT set_config(name, 'off', true) FROM unnest(ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_indexonlyscan',
    'enable_sort', 'enable_incremental_sort']) AS name
"""
_SHORT = """
SELECT n.nspname, c.relname, pg_get_indexdef(i.indexrelid, 1, true)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT i.indexrelid FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am a ON a.oid = x.relam
    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND a.amname = 'btree'
    ORDER BY NOT i.indisprimary, x.relpages LIMIT 1) AS i
WHERE c.oid = %s AND c.relkind IN ('r', 'm')
  AND (%s OR c.relpages > (SELECT pg_relation_size(%s::oid::regclass) / current_setting('block_size')::bigint))
"""


def _classify(connection: Connection, relation: AmcheckRelation, error: psycopg.Error) -> tuple[Outcome, str]:
    parts = (error.diag.message_primary or first_line(error), error.diag.message_detail)
    text = "; ".join(part.strip() for part in parts if part)
    if isinstance(error, psycopg.errors.SerializationFailure):  # the primary removed rows that this check read
        return "not checked", f"{text}: set hot_standby_feedback = on there, or raise max_standby_streaming_delay"
    if connection.broken:
        return "not checked", f"the server ended the session during this check ({text}): check its log for a crash"
    if isinstance(error, psycopg.errors.QueryCanceled):
        return "not reached", f"cancelled: {text}"
    if error.sqlstate in DAMAGE:
        try:
            exists = execute(connection, "SELECT 1 FROM pg_class WHERE oid = %s", relation.oid)
        except psycopg.Error as error:
            return "damaged", f"{text}; and in the system catalogs: {first_line(error)}"
        return ("damaged", text) if exists else ("not checked", "it was dropped meanwhile")
    return "not checked", text


INSTALL = "install extension"
EXTENSION = "amcheck"
REPLAY_SECONDS = 30.0


@dataclass(frozen=True)
class Extension:
    """amcheck in a database. `schema`: empty if it is not installed.

    `replayed`: time of the last commit that a standby has replayed; empty on a primary, or if there is none.
    """

    schema: str
    version: str
    available: str
    in_recovery: bool
    replayed: str


@probe
def find_amcheck(postgres: Postgres, database: str) -> Extension:
    """Whether it is installed or available.

    Raises:
        Unreachable: the server is down.
        OpsError: there is no such database.
    """
    return _read_extension(postgres, database)


def wait_for_amcheck(standby: Postgres, database: str) -> Extension:
    """Wait until a standby has replayed the installation on the primary.

    Raises:
        Unreachable: it has not within half a minute.
    """
    hint = "check the standby's lag with check-replication, then run this again"
    what = f"the replay of CREATE EXTENSION amcheck on {standby.host}:{standby.port}"

    def installed() -> Extension | None:
        found = _read_extension(standby, database)
        return found if found.schema else None

    found = until(installed, what=what, seconds=REPLAY_SECONDS, every_seconds=0.2, hint=hint)
    assert found
    return found


def _read_extension(postgres: Postgres, database: str) -> Extension:
    with postgres.connect(database) as connection:
        row = execute(connection, _EXTENSION)[0]
    return Extension(str(row[0] or ""), str(row[1] or ""), str(row[2] or ""), bool(row[3]), str(row[4] or "")[:19])


_EXTENSION = """
SELECT (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = 'amcheck'),
       (SELECT extversion FROM pg_extension WHERE extname = 'amcheck'),
       (SELECT default_version FROM pg_available_extensions WHERE name = 'amcheck'), pg_is_in_recovery(),
       pg_last_xact_replay_timestamp()
"""


@action(of=lambda database: Act(INSTALL, f"{EXTENSION} in {database}"), idempotent=True)
def install_amcheck(postgres: Postgres, database: str) -> None:
    """CREATE EXTENSION, if it is missing."""
    with postgres.connect(database) as connection:
        execute(connection, "CREATE EXTENSION IF NOT EXISTS amcheck")
