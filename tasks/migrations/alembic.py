"""Alembic's own program: a database's revision, and the way up and down. https://alembic.sqlalchemy.org/"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg

from blocks.places import Application
from blocks.postgres import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.kinds import action, probe
from runbook.permit import Act, Permit
from runbook.progress import progress
from tasks.migrations.columns import Columns, count_filled
from tasks.migrations.scripts import BASE, HEAD, heads_of
from tasks.postgres.content import read_counts

MIGRATE, ROLL_BACK = "migrate", "roll back"
TIMEOUT_SECONDS = 3600.0
TAIL_LINES = 20
# A migration that waits for a lock makes everybody wait behind it: it gives up instead, and the schema stays as it was.
LOCK_TIMEOUT = "-c lock_timeout=10s"
HINT = "see at which revision it is now; correct the migration or what it needs, then launch this again"


@dataclass(frozen=True)
class Migrated:
    """A database's revision before and after, and the end of what Alembic said (empty where nothing was pending)."""

    before: str
    after: str
    seconds: float
    output: str


@dataclass(frozen=True)
class Undo:
    """A downgrade as it was judged: from where to where (empty: base), the tables that lose rows or what is in columns,
    which of them are dropped, which columns are, and the rows whose data goes: those deleted from tables that stay, and
    altogether at most. Dropped tables' and columns' are counted again before anything is touched."""

    before: str
    target: str
    tables: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    columns: Columns = ()
    deleted: int = 0
    rows: int = 0

    def act(self, database: str) -> Act:
        """What a permit must say."""
        losing = f", losing up to {self.rows:,} rows in {len(self.tables)} tables" if self.tables else ""
        dropping = ", ".join(f"{table} ({', '.join(names)})" for table, names in self.columns)
        columns = f", dropping columns of {dropping}" if dropping else ""
        return Act(ROLL_BACK, f"{database} to {self.target or BASE}{losing}{columns}")


@probe
def read_revision(postgres: Postgres, database: str) -> str:
    """What `alembic_version` says: empty when there is none, several joined with commas.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses, or the table is not Alembic's.
    """
    return revision_of(postgres, database)


@action
def upgrade(
    permit: Permit,
    postgres: Postgres,
    application: Application,
    database: str,
    revision: str = HEAD,
    backend_directory: Path | None = None,
) -> Migrated:
    """`alembic upgrade` on one database (§8.2, step 5), as the application's role. Nothing is run where nothing is
    pending. Where Alembic runs them in one transaction, what fails leaves the schema as it was.

    The permit names the application's database, also where `database` is a copy that will take its place.

    Raises:
        NotConfirmed: not permitted.
        OpsError: several heads, an unknown revision, or the migration failed; the end of its output is in the message.
    """
    permit.require(MIGRATE, postgres.database)
    heads = heads_of(application, backend_directory)
    before = revision_of(postgres, database)
    target = heads.resolve(revision)
    if not heads.pending(before, target):
        return Migrated(before, before, 0.0, "")
    done = run_alembic(postgres, application, database, ("upgrade", target), backend_directory)
    after = revision_of(postgres, database)
    if heads.pending(after, target):
        raise OpsError(f"alembic said nothing, yet {database} is at {after or 'no revision'} instead of {target}", HINT)
    return Migrated(before, after, done.seconds, done.stdout)


@action
def downgrade(permit: Permit, postgres: Postgres, application: Application, undo: Undo) -> Migrated:
    """`alembic downgrade` on the application's database, as its role, exactly as it was judged.

    Raises:
        NotConfirmed: not permitted.
        OpsError: the database is no longer what was judged (its revision, or more data would go), or it failed.
    """
    database = postgres.database
    permit.require(ROLL_BACK, undo.act(database).target)
    before = revision_of(postgres, database)
    if before != undo.before:
        raise OpsError(f"{database} is at {before or 'no revision'} now, not at {undo.before}", "launch this again")
    counts = dict(read_counts.work(postgres, database).rows) if undo.dropped else {}
    filled = count_filled.work(postgres, database, undo.columns) if undo.columns else {}
    rows = sum(counts.get(table, 0) for table in undo.dropped) + sum(filled.values()) + undo.deleted
    if rows > undo.rows:
        raise OpsError(
            f"{rows:,} rows would lose data by now, {undo.rows:,} were accepted",
            f"stop what is writing (the backend) and launch this again with lose_rows={rows}",
        )
    done = run_alembic(postgres, application, database, ("downgrade", undo.target or BASE))
    after = revision_of(postgres, database)
    if after != undo.target:
        raise OpsError(
            f"alembic said nothing, yet {database} is at {after or BASE} instead of {undo.target or BASE}", HINT
        )
    return Migrated(before, after, done.seconds, done.stdout)


def run_alembic(
    postgres: Postgres,
    application: Application,
    database: str,
    command: Sequence[str],
    backend_directory: Path | None = None,
    *,
    options: str = "",
) -> shell.Completed:
    """Run one command of Alembic's with the application's Python on one database; returns the end of what it said.

    Raises:
        OpsError: it failed, and the line that names why.
    """
    what = f"alembic {' '.join(command[:2])}"
    secret = postgres.password.get_secret_value()
    try:
        with progress(lambda: _waiting(postgres, database, what)):
            done = shell.run(
                [application.python, "-m", "alembic", *command],
                environment=_environment(postgres, database, options or LOCK_TIMEOUT),
                directory=backend_directory or Path(application.backend_directory),
                timeout_seconds=TIMEOUT_SECONDS,
                hint=HINT,
            )
    except CommandFailed as error:
        raise OpsError(f"{what} failed: {_cause(_masked(error.stderr, secret))}", HINT) from None
    lines = _masked(done.stderr + done.stdout, secret).strip().splitlines()
    return shell.Completed("\n".join(lines[-TAIL_LINES:]), "", done.seconds)


def _environment(postgres: Postgres, database: str, options: str) -> Mapping[str, str]:
    return {
        "DATABASE_URL": postgres.url(database),
        "PGOPTIONS": options,
        "PGAPPNAME": "interview-ops",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _waiting(postgres: Postgres, database: str, what: str) -> str:
    """Whom the migration's session waits for, if it does."""
    with postgres.connect() as connection:
        rows = execute(connection, _BLOCKED, database, postgres.user)
    by = "; ".join(f"process {pid} ({name or 'no name'}, {state})" for pid, name, state in rows[:3])
    return f"{what} on {database}: " + (f"something waits for {by}" if by else "runs")


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
            raise OpsError(
                f"the revision of {database} cannot be read: {what}", "look at its alembic_version"
            ) from None
    return ",".join(str(row[0]) for row in rows)


def _cause(output: str) -> str:
    """The line of a traceback that names the error; Alembic's own messages are one line. PostgreSQL's DETAIL is left
    out: it quotes rows."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?!DETAIL|HINT|CONTEXT)[\w.]+: ", line)]
    return (named or lines or ["no message"])[-1][:500]


def _masked(text: str, secret: str) -> str:
    """A driver may quote the connection string that it was given."""
    for form in {secret, quote(secret, safe=""), quote(secret)} - {""}:
        text = text.replace(form, "********")
    return text
