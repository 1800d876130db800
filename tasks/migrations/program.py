"""Run Alembic on one database, and prove that it connects to it. https://alembic.sqlalchemy.org/"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.places import Application
from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.kinds import action
from runbook.masking import without
from runbook.progress import progress

TIMEOUT_SECONDS = 3600.0
TAIL_LINES = 20
# A migration that waits for a lock blocks all later queries on the table, so it gives up. Drivers based on libpq read
# PGOPTIONS; asyncpg does not, which a rehearsal detects (tasks/migrations/locks.py).
LOCK_TIMEOUT = "-c lock_timeout=10s"
# Otherwise the server continues a migration after its program was killed.
ENDS_WITH_ITS_CLIENT = "-c client_connection_check_interval=2s"
# If the application configures no logging, Alembic prints errors on stdout only: both are read as one.
_PROGRAM = "import sys; sys.stdout = sys.stderr; from alembic.config import main; main(prog='alembic')"
HINT = "check the current revision, correct the migration or its environment, then run this again"


def run_alembic(
    postgres: Postgres,
    application: Application,
    database: str,
    command: Sequence[str],
    backend_directory: Path | None = None,
    *,
    options: str = "",
) -> shell.Completed:
    """Run one Alembic command with the application's Python on one database; returns the end of its output.

    Raises:
        OpsError: it failed; the message has the line with the cause.
    """
    what = f"alembic {' '.join(command[:2])}"
    secret = postgres.password.get_secret_value()
    try:
        with progress(lambda: _waiting(postgres, database, what)):
            done = shell.run(
                [application.need("python"), "-c", _PROGRAM, *command],
                environment=_environment(postgres, database, options or LOCK_TIMEOUT),
                inherit=application.inherit,
                directory=backend_directory or Path(application.need("backend_directory")),
                timeout_seconds=TIMEOUT_SECONDS,
                hint=HINT,
            )
    except CommandFailed as error:
        raise OpsError(f"{what} failed: {_cause(without(error.stderr, [secret]))}", HINT) from None
    lines = without(done.stderr, [secret]).strip().splitlines()
    return shell.Completed("\n".join(lines[-TAIL_LINES:]), "", done.seconds)


def _environment(postgres: Postgres, database: str, options: str) -> Mapping[str, str]:
    return {
        "DATABASE_URL": postgres.url(database),
        "PGOPTIONS": f"{postgres.without_timeouts} {options} {ENDS_WITH_ITS_CLIENT}",
        "PGAPPNAME": "interview-ops",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _waiting(postgres: Postgres, database: str, what: str) -> str:
    """The sessions that block the migration, if any."""
    with postgres.connect() as connection:
        rows = execute(connection, _BLOCKED, database, postgres.user)
    by = "; ".join(f"process {pid} ({name or 'no name'}, {state})" for pid, name, state in rows[:3])
    return f"{what} on {database}: " + (f"waits for {by}" if by else "running")


_BLOCKED = """
SELECT DISTINCT other.pid, other.application_name, other.state
FROM pg_stat_activity own CROSS JOIN unnest(pg_blocking_pids(own.pid)) AS b(pid)
JOIN pg_stat_activity other ON other.pid = b.pid
WHERE own.datname = %s AND own.usename = %s AND own.wait_event_type = 'Lock'
"""


def revision_of(postgres: Postgres, database: str) -> str:
    """See `read_revision`."""
    with postgres.connect(database) as connection:
        try:
            found = execute(connection, "SELECT pg_catalog.to_regclass('public.alembic_version')")
            if found[0][0] is None:
                return ""
            rows = execute(connection, "SELECT version_num FROM public.alembic_version ORDER BY 1")
        except psycopg.Error as error:
            what = str(error).splitlines()[0]
            hint = "check its table alembic_version"
            raise OpsError(f"the revision of {database} cannot be read: {what}", hint) from None
    return ",".join(str(row[0]) for row in rows)


@action
def require_reached(
    postgres: Postgres, application: Application, database: str, backend_directory: Path | None = None
) -> None:
    """Prove that Alembic connects to this scratch database and not to another one.

    The version table there gets an unknown revision for a moment; `alembic current`, which changes nothing, must fail
    on it.

    Raises:
        VerificationFailed: it connected to another database.
        OpsError: it failed for another reason.
    """
    with postgres.connect(database) as connection, connection.transaction():
        connection.execute(_MARK.format(marker=sql.Literal(MARKER), role=sql.Identifier(postgres.user)))
    try:
        run_alembic(postgres, application, database, ("current",), backend_directory)
    except OpsError as error:
        if MARKER not in error.message:
            raise
    else:
        raise VerificationFailed(
            f"Alembic connected to another database than {database}: nothing was migrated",
            "make alembic/env.py use the variable DATABASE_URL before alembic.ini, .env or any other variable, and "
            "public.alembic_version for the revision; then run this again",
        )
    finally:
        with postgres.connect(database) as connection, connection.transaction():
            connection.execute(_UNMARK)


MARKER = "interview_ops_looks_for_this"
_MARK = sql.SQL("""
ALTER TABLE IF EXISTS public.alembic_version RENAME TO alembic_version_aside;
CREATE TABLE public.alembic_version AS SELECT {marker}::varchar(32) AS version_num;
GRANT SELECT ON public.alembic_version TO {role};
""")
_UNMARK = """
DROP TABLE public.alembic_version;
ALTER TABLE IF EXISTS public.alembic_version_aside RENAME TO alembic_version;
"""


def _cause(output: str) -> str:
    """The line of a traceback that names the error. PostgreSQL's DETAIL is left out, because it quotes rows."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?!DETAIL|HINT|CONTEXT)[\w.]+: ", line)]
    return (named or lines or ["no message"])[-1][:500]
