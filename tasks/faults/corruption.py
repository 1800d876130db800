"""A bug of the application: one transaction rewrites every row of a table while clients write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import sql

from blocks.environment import Environment
from blocks.places import Corruption
from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.faults.disposable import BREAK, Fault, require_disposable


def corruption_of(env: Environment) -> Corruption:
    """The bug that the environment describes.

    Raises:
        OpsError: there is none.
    """
    if env.application.corruption is None:
        raise OpsError(
            "[application.corruption] is not configured: the drill has no table to corrupt",
            "set table, time and set (docs/application.md)",
        )
    return env.application.corruption


@dataclass(frozen=True)
class Fingerprint:
    """The number of rows of the table older than a moment, and the sum of the hashes of their text."""

    rows: int
    hash: str

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.hash}"


@probe
def read_fingerprint(postgres: Postgres, database: str, bug: Corruption, before: datetime) -> Fingerprint:
    """Of the rows that are older than the drill, which its clients do not change.

    Raises:
        Unreachable: the server is down.
    """
    with postgres.connect(database) as connection:
        execute(connection, "SET timezone = 'UTC'")
        query = sql.SQL(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM {} t WHERE {} < {}"
        ).format(sql.Identifier(*bug.names), sql.Identifier(bug.time), sql.Literal(before))
        ((count, total),) = connection.execute(query).fetchall()
    return Fingerprint(int(str(count)), str(total))


@action(of=lambda env: Act(BREAK, corruption_of(env).table))
def rewrite_rows(env: Environment, note: Callable[[int], None]) -> Fault:
    """Rewrite the rows. `note` gets the transaction's number before the commit.

    Raises:
        OpsError: the environment is not disposable, or describes no bug.
    """
    require_disposable(env)
    bug = corruption_of(env)
    postgres = env.postgres
    with postgres.connect(postgres.database, autocommit=False) as connection:
        xid = int(str(execute(connection, "SELECT pg_current_xact_id()::xid::text")[0][0]))
        note(xid)
        failpoint("fault: transaction noted")
        rows = connection.execute(
            sql.SQL("UPDATE {} SET {}").format(
                sql.Identifier(*bug.names),
                sql.SQL(", ").join(
                    sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value))
                    for name, value in bug.set.items()
                ),
            )
        ).rowcount
        began = datetime.now(UTC)
        connection.commit()
    what = f"a bug rewrote {rows:,} rows of {bug.table} in one transaction"
    return Fault(what, began, datetime.now(UTC), {"xid": str(xid), "rows": str(rows)})
