"""A reviewed salvage carried out: in one transaction, in which foreign keys are asked before it commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from blocks.postgres import Connection, Postgres, execute
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.permit import Permit
from tasks.postgres.dangling import find_dangling
from tasks.postgres.salvage import SQL, Ran, run, statements_in
from tasks.postgres.table_checks import advance, require_deferrable, require_references, require_unchanged
from tasks.postgres.table_session import writing
from tasks.postgres.table_ties import Ties
from tasks.postgres.tables import Table

SALVAGE = "write salvaged rows into"
LOCK_SECONDS = 20


@dataclass(frozen=True)
class Applied:
    """What was done, and the sequences that were advanced."""

    ran: Ran
    sequences: tuple[str, ...]


@action
def apply_salvage(
    permit: Permit, postgres: Postgres, directory: Path, digest: str, tables: Sequence[Table], ties: Ties
) -> Applied:
    """Run the statements of a file that is what was reviewed, all or none.

    Raises:
        VerificationFailed: the file or a table is another than was reviewed, or rows would reference what is not there.
        OpsError: a lock was not to be had, or the live database refuses a row. Nothing was changed.
    """
    for table in tables:
        permit.require(SALVAGE, table.name)
    with writing(postgres, "") as connection, connection.transaction():
        _lock(connection, tables)
        require_unchanged(connection, tables, ties)
        ran = run(connection, statements_in(directory / SQL, digest))
        failpoint("salvage: written")
        require_references(tuple(find_dangling(connection, ties.keys)))
        require_deferrable(connection, tables)
        advanced = tuple(name for one in ties.sequences if (name := advance(connection, one)))
        failpoint("salvage: before commit")
    failpoint("salvage: after commit")
    return Applied(ran, advanced)


def _lock(connection: Connection, tables: Sequence[Table]) -> None:
    """Writers wait, and the checks of foreign keys too: whoever deletes what a row that is written here references must
    see that row. In one order, so that two runs cannot deadlock."""
    execute(connection, "SELECT set_config('lock_timeout', %s, true)", f"{LOCK_SECONDS}s")
    for table in sorted(tables, key=lambda table: table.oid):
        name = sql.Identifier(table.schema, table.relation)
        connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(name))
