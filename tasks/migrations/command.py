"""Migrations by another tool: the environment's command, run on one database, with a proof that it connected there.

A command may read its own configuration instead of the address that it gets. While it runs on a copy, the live database
refuses it (tasks/migrations/live.py).
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.masking import without
from runbook.wait import until
from tasks.migrations.alembic import MIGRATE, MigratedDatabase
from tasks.migrations.live import GuardedDatabase, guarding
from tasks.migrations.program import TAIL_LINES, TIMEOUT_SECONDS

REACHED_SECONDS = 20.0
NOT_RUN = 127
"""The shell's exit code of a program that it cannot run."""
_SESSIONS = "SELECT sessions, numbackends FROM pg_stat_database WHERE datname = %s"
HINT = "make the command use DATABASE_URL or libpq's variables (PGHOST, PGDATABASE, …) before its own configuration"


class MigrationFailed(OpsError):
    """The command failed, or did not connect to the copy. `output`: what it printed; `live`: the live database, where
    another one was migrated."""

    def __init__(self, message: str, hint: str, output: str = "", live: GuardedDatabase | None = None) -> None:
        self.output = output
        self.live = live
        super().__init__(message, hint)

    def __reduce__(self) -> tuple[type[MigrationFailed], tuple[str, str, str, GuardedDatabase | None]]:
        """Prefect stores what a run raised."""
        return MigrationFailed, (self.message, self.hint, self.output, self.live)


@action(of=lambda postgres: Act(MIGRATE, postgres.database))
def run_command(postgres: Postgres, application: Application, database: str, directory: Path) -> MigratedDatabase:
    """Run `[application] migrate_command` in the backend's directory, as the application's role, with the database's
    address in `DATABASE_URL` and libpq's variables.

    Its act names the application's database, even if `database` is a copy that will replace it.

    Raises:
        MigrationFailed: it failed, tried to change the live database, or opened no session in `database`
            (pg_stat_database.sessions).
    """
    before, _ = _sessions(postgres, database)
    with guarding(postgres) if database != postgres.database else nullcontext() as live:
        done = _run(postgres, application, database, directory)
        reached = _is_reached(postgres, database, before)
    said, also = _output(postgres, done), f"; {live.text}" if live else ""
    if done.code and (reached or not (live and live.ended)):
        failed = CommandFailed(application.migrate_command, done.code, done.stderr.strip() or done.stdout)
        message = without(f"the migration command failed: {failed.message}", [postgres.password.get_secret_value()])
        raise MigrationFailed(message + also, "correct the cause, then run this again", said, live)
    if not reached:
        message = f"the migration command did not connect to {database}"
        if live and live.ended:
            message = f"the migration command connected to the live database instead of {database}"
        raise MigrationFailed(message + also, HINT, said, live)
    return MigratedDatabase("", "", done.seconds, said, live.text if live else "")


def _run(postgres: Postgres, application: Application, database: str, directory: Path) -> shell.Completed:
    environment = {
        **postgres.environment(as_application=True),
        "PGDATABASE": database,
        "DATABASE_URL": postgres.url(database),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    started = time.monotonic()
    try:
        return shell.run(
            application.migrate_command,
            environment=environment,
            inherit=application.inherit,
            directory=directory if directory.is_dir() else Path("/"),
            timeout_seconds=TIMEOUT_SECONDS,
            accepted=range(-64, 256),
        )
    except OpsError as error:  # not installed, or endless: what it did to the live database counts as well
        return shell.Completed("", f"{error.message}; {error.hint}", time.monotonic() - started, NOT_RUN)


def _output(postgres: Postgres, done: shell.Completed) -> str:
    """The last lines of both streams: one program prints its errors here, another there."""
    secret = postgres.password.get_secret_value()
    streams = (without(text, [secret]).strip().splitlines()[-TAIL_LINES:] for text in (done.stdout, done.stderr))
    return "\n".join(line for lines in streams for line in lines)


def _is_reached(postgres: Postgres, database: str, before: int) -> bool:
    """A session's statistics arrive before it is gone."""
    with suppress(Unreachable):
        until(lambda: not _sessions(postgres, database)[1], what="the end of its sessions", seconds=REACHED_SECONDS)
    return _sessions(postgres, database)[0] > before


def _sessions(postgres: Postgres, database: str) -> tuple[int, int]:
    """How many were opened in a database, and how many there are."""
    with postgres.connect() as connection:
        rows = execute(connection, _SESSIONS, database)
    return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)
