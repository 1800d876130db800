"""A bug of the application: one transaction that rewrites every interview, while clients go on writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from blocks.environment import Environment
from blocks.postgres import Postgres, execute
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.faults.disposable import Fault, require_allowed

TABLE = "public.interview_sessions"


@dataclass(frozen=True)
class Fingerprint:
    """How many rows of the table began before a moment, and the sum of the hashes of their text."""

    rows: int
    hash: str

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.hash}"


@probe
def read_fingerprint(postgres: Postgres, database: str, before: datetime) -> Fingerprint:
    """Of the rows that no client of a drill touches, since they are older than it.

    Raises:
        Unreachable: the server is down.
    """
    with postgres.connect(database) as connection:
        execute(connection, "SET timezone = 'UTC'")
        count, total = execute(
            connection,
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text"
            " FROM public.interview_sessions t WHERE started_at < %s",
            before,
        )[0]
    return Fingerprint(int(str(count)), str(total))


@action
def rewrite_rows(permit: Permit, env: Environment, note: Callable[[int], None]) -> Fault:
    """The bug. `note` gets its transaction's number before it is committed.

    Raises:
        OpsError: the environment is not disposable.
    """
    require_allowed(env, permit, TABLE)
    postgres = env.postgres
    with postgres.connect(postgres.database, autocommit=False) as connection:
        xid = int(str(execute(connection, "SELECT pg_current_xact_id()::xid::text")[0][0]))
        note(xid)
        failpoint("fault: transaction noted")
        rows = connection.execute(
            "UPDATE public.interview_sessions SET position = '', status = 'completed', score = 0"
        ).rowcount
        began = datetime.now(UTC)
        connection.commit()
    what = f"a bug rewrote {rows:,} rows of {TABLE} in one transaction"
    return Fault(what, began, datetime.now(UTC), {"xid": str(xid), "rows": str(rows)})
