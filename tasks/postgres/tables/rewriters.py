"""The transaction that wrote most rows of a table: after a faulty mass update, recovery must stop before it."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import probe


@dataclass(frozen=True)
class Rewriter:
    """A transaction (its 32-bit id in rows and WAL), and the number of a table's rows that it wrote last."""

    xid: int
    rows: int
    of_rows: int


@probe
def find_rewriter(postgres: Postgres, database: str, table: str) -> Rewriter:
    """The transaction that wrote most of a table's rows. Reads the whole table.

    https://www.postgresql.org/docs/current/ddl-system-columns.html

    Raises:
        OpsError: the table is empty.
        Unreachable: the server is down.
    """
    query = sql.SQL(
        "SELECT xmin::text::bigint, count(*), sum(count(*)) OVER () FROM public.{} GROUP BY 1 ORDER BY 2 DESC, 1 DESC"
    ).format(sql.Identifier(table))
    with postgres.connect(database) as connection:
        rows = execute(connection, query)
    if not rows:
        raise OpsError(f"{table} is empty: no row shows its last writer", "find the transaction that emptied it in WAL")
    return Rewriter(int(str(rows[0][0])), int(str(rows[0][1])), int(str(rows[0][2])))
