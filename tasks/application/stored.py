"""Resources of acknowledged writes that a database has."""

from __future__ import annotations

from collections.abc import Collection

from psycopg import sql

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe

_KEY = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary AND i.indnatts = 1
"""


@probe
def find_stored(postgres: Postgres, application: Application, resources: Collection[str]) -> frozenset[str]:
    """Those of `resources` that are the primary key of a row in a table of `[application.writes]`.

    Raises:
        OpsError: the database cannot be queried.
    """
    found, wanted = set[str](), sorted({one for one in resources if one})
    tables = dict.fromkeys((schema, table) for schema, table, _ in (step.column for step in application.writes.steps))
    if not wanted:
        return frozenset()
    with postgres.connect(postgres.database) as connection:
        for schema, table in tables:
            name = sql.Identifier(schema, table)
            for (key,) in execute(connection, _KEY, name.as_string(connection)):
                query = sql.SQL("SELECT {key}::text FROM {name} WHERE {key}::text = ANY({wanted})").format(
                    key=sql.Identifier(str(key)), name=name, wanted=sql.Literal(wanted)
                )
                found.update(str(one) for (one,) in execute(connection, query))
    return frozenset(found)
