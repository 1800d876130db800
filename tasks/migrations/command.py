"""Migrations by another tool: the environment's command, run on one database, with a proof that it connected there."""

from __future__ import annotations

import os
from pathlib import Path

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.guard.permit import Permit
from runbook.kinds import action
from runbook.wait import until
from tasks.migrations.alembic import MIGRATE, MigratedDatabase
from tasks.migrations.program import TIMEOUT_SECONDS

REACHED_SECONDS = 20.0
_SESSIONS = "SELECT sessions FROM pg_stat_database WHERE datname = %s"
HINT = "make the command use DATABASE_URL or libpq's variables (PGHOST, PGDATABASE, …)"


@action
def run_command(
    permit: Permit, postgres: Postgres, application: Application, database: str, directory: Path
) -> MigratedDatabase:
    """Run `[application] migrate_command` in the backend's directory, as the application's role, with the database's
    address in `DATABASE_URL` and libpq's variables.

    The permit names the application's database, even if `database` is a copy that will replace it.

    Raises:
        NotConfirmed: not permitted.
        OpsError: it failed; the message has the end of its output.
        VerificationFailed: it opened no session in that database (pg_stat_database.sessions).
    """
    permit.require(MIGRATE, postgres.database)
    before = _sessions(postgres, database)
    environment = {
        **postgres.environment(as_application=True),
        "PGDATABASE": database,
        "DATABASE_URL": postgres.url(database),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    try:
        done = shell.run(
            application.migrate_command,
            environment=environment,
            inherit=application.inherit,
            directory=directory if directory.is_dir() else Path("/"),
            timeout_seconds=TIMEOUT_SECONDS,
        )
    except CommandFailed as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        hint = "correct the command; the live database is unchanged"
        raise OpsError(f"the migration command failed: {last[:300]}", hint) from None
    try:  # statistics arrive when a session ends, within a second
        until(lambda: _sessions(postgres, database) > before, what="its session", seconds=REACHED_SECONDS)
    except OpsError:
        raise VerificationFailed(f"the migration command did not connect to {database}", HINT) from None
    return MigratedDatabase("", "", done.seconds, "")


def _sessions(postgres: Postgres, database: str) -> int:
    with postgres.connect() as connection:
        rows = execute(connection, _SESSIONS, database)
    return int(rows[0][0]) if rows else 0
