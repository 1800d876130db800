"""Switch off CHECK constraints that would refuse valid rows in a restore: they depend on the time, or on tables that a
function finds by `search_path`.

https://www.postgresql.org/docs/current/ddl-constraints.html#DDL-CONSTRAINTS-CHECK-CONSTRAINTS (the note)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import psycopg

from blocks.postgres.server import Postgres, execute
from tasks.postgres.content.quiet import copy_options


@contextmanager
def unchecked(postgres: Postgres, database: str, tables: Collection[tuple[str, str]]) -> Iterator[None]:
    """In the block no CHECK constraint of these tables of a copy is checked.

    Dropping them and adding them as NOT VALID would leave another definition than the backup's. A relation with
    `relchecks` = 0 loads none (src/backend/utils/cache/relcache.c, RelationBuildTupleDesc). Only a superuser can set
    it; for other roles the constraints are checked.
    """
    schemas, names = [schema for schema, _ in tables], [name for _, name in tables]
    with postgres.connect(database, options=copy_options(postgres)) as connection:
        try:
            execute(connection, _SWITCH_OFF, schemas, names)
        except psycopg.errors.InsufficientPrivilege:
            yield
            return
        yield
        execute(connection, _SWITCH_ON, schemas, names)


_SWITCH_OFF = """
UPDATE pg_class c SET relchecks = 0 FROM pg_namespace n, unnest(%s::text[], %s::text[]) AS chosen(schema, name)
WHERE n.oid = c.relnamespace AND n.nspname = chosen.schema AND c.relname = chosen.name
"""
_SWITCH_ON = """
UPDATE pg_class c SET relchecks = (SELECT count(*) FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'c')
FROM pg_namespace n, unnest(%s::text[], %s::text[]) AS chosen(schema, name)
WHERE n.oid = c.relnamespace AND n.nspname = chosen.schema AND c.relname = chosen.name
"""
