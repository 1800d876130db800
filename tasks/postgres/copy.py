"""A copy beside the live database: created, filled, analysed. Nothing here touches the live one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import psycopg
from psycopg import sql

from blocks.postgres import Connection, Postgres, execute
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.permit import Permit
from runbook.progress import progress
from runbook.render import size
from tasks.catalogue import Backup
from tasks.postgres.content import DatabaseContent
from tasks.postgres.dump import DUMP, GLOBALS, STATISTICS_VERSION, carries_statistics
from tasks.postgres.properties import apply_properties, creation

REPLACE = "replace database"
MOST_MAINTENANCE_MB = 512


@dataclass(frozen=True)
class Copy:
    """A database beside the live one, and the server's identity of it."""

    database: str
    oid: int
    seconds: float = 0.0


def name_beside(database: str, suffix: str) -> str:
    """A name for a database beside another, within PostgreSQL's 63 bytes."""
    room = 63 - len(suffix.encode())
    return database.encode()[:room].decode(errors="ignore") + suffix


def copy_name(database: str) -> str:
    """Where a restore is built: reserved for that, a leftover is dropped."""
    return name_beside(database, "__new")


def content_in(backup: Backup) -> DatabaseContent:
    """The content manifest of a database's backup."""
    return DatabaseContent.model_validate(backup.manifest.content)


def scratch_name(database: str) -> str:
    """Where a backup is verified: reserved for that, a leftover is dropped."""
    return name_beside(database, "__verify")


@action
def create_copy(permit: Permit, postgres: Postgres, backup: Backup) -> Copy:
    """An empty database from template0 with the backup's owner, encoding, locale and tablespace."""
    permit.require(REPLACE, postgres.database)
    return _create(postgres, backup, copy_name(postgres.database))


@action(idempotent=True)
def create_scratch(postgres: Postgres, backup: Backup) -> Copy:
    """The same under the name that is reserved for verifying: nothing will take the live name."""
    return _create(postgres, backup, scratch_name(postgres.database))


@action(idempotent=True)
def drop_scratch(postgres: Postgres) -> str:
    """Remove what a verification made."""
    name = scratch_name(postgres.database)
    with postgres.connect() as connection:
        drop(connection, name)
    return name


def _create(postgres: Postgres, backup: Backup, name: str) -> Copy:
    with postgres.connect() as connection:
        drop(connection, name)
        connection.execute(creation(name, content_in(backup).properties))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
        return Copy(name, oid_of(connection, name))


@action
def fill_copy(permit: Permit, postgres: Postgres, backup: Backup, copy: Copy, jobs: int) -> Copy:
    """`pg_restore` with `jobs` workers, stopping at the first error, in sessions that are set for speed."""
    permit.require(REPLACE, postgres.database)
    return _fill(postgres, backup, copy, jobs)


@action
def fill_scratch(postgres: Postgres, backup: Backup, scratch: Copy, jobs: int) -> Copy:
    """The same into a scratch database."""
    return _fill(postgres, backup, scratch, jobs)


def _fill(postgres: Postgres, backup: Backup, copy: Copy, jobs: int) -> Copy:
    memory = min(MOST_MAINTENANCE_MB, psutil.virtual_memory().available // (4 * jobs) >> 20)
    settings = {
        "maintenance_work_mem": f"{max(memory, 64)}MB",
        "synchronous_commit": "off",
        "max_parallel_maintenance_workers": "0",  # the jobs fill the processors already
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
    }
    environment = {
        **postgres.environment(),
        "PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    argv = [
        *(postgres.program("pg_restore"), "--format=directory", f"--jobs={jobs}", "--exit-on-error", "--no-password"),
        # A superuser's COPY passes row security anyway; a view of a table with forced policies fills only like this.
        *(["--statistics"] if carries_statistics(postgres) else []),
        *("--enable-row-security", "--dbname", copy.database, str(backup.path / DUMP)),
    ]
    whole = content_in(backup).bytes

    def tell() -> str:
        with postgres.connect() as connection:
            size_now = execute(connection, "SELECT pg_database_size(%s::oid)", copy.oid)[0][0]
        return f"{copy.database}: {size(int(size_now))} of about {size(whole)} restored"

    with progress(tell):
        done = shell.run(argv, environment=environment, hint="the live database was not touched; try the backup before")
    with postgres.connect() as connection:
        apply_properties(connection, copy.database, content_in(backup).properties)
    return Copy(copy.database, copy.oid, done.seconds)


@action(idempotent=True)
def analyze(postgres: Postgres, database: str, jobs: int, *, everything: bool = False) -> str:
    """Planner statistics, without which the first queries are ten thousand times dearer (recovery-rules).

    From 18 on they come with the dump, and only what lacks them is analysed, unless `everything` is to be.
    """
    argv = [postgres.program("vacuumdb"), "--analyze-only", f"--jobs={jobs}", "--no-password", "--dbname", database]
    with postgres.connect(database) as connection:
        carried = connection.info.server_version >= STATISTICS_VERSION
        missing = ["--missing-stats-only"] if carried and not everything else []
        shell.run([*argv, *missing], environment=postgres.environment())
        for schema, table in [] if carried else execute(connection, _PARENTS):
            connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(schema, table)))
    return database


# vacuumdb passes over partitioned parents before 18.
_PARENTS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'p' AND NOT c.relispartition
"""


@action
def drop_copy(permit: Permit, postgres: Postgres) -> str:
    """Remove a copy that failed its proof."""
    permit.require(REPLACE, postgres.database)
    name = copy_name(postgres.database)
    with postgres.connect() as connection:
        drop(connection, name)
    return name


@probe
def try_login(postgres: Postgres, database: str) -> str:
    """Log in as the application's role: pg_hba may name the database, a privilege may be missing.

    Raises:
        OpsError: it cannot.
    """
    with postgres.connect(database, as_application=True) as connection:
        return str(execute(connection, "SELECT current_user")[0][0])


@dataclass(frozen=True)
class MadeRoles:
    """The roles that were made, and those of them that may log in but have no password yet."""

    names: tuple[str, ...]
    without_password: tuple[str, ...]


@action(idempotent=True)
def create_roles(permit: Permit, postgres: Postgres, backup: Backup, existing: Sequence[str]) -> MadeRoles:
    """On a server without databases: what it lacks of the backup's roles, and its tablespaces.

    Backups hold no passwords: the application's comes from the secrets. Tablespaces cannot be made in a transaction.

    Raises:
        OpsError: a tablespace's directory is not there.
    """
    permit.require(REPLACE, postgres.database)
    lines = (backup.path / GLOBALS).read_text(encoding="utf-8").splitlines()
    with postgres.connect() as connection:
        made = _make_roles(connection, postgres, lines, existing)
        for line in lines:
            if line.startswith(("CREATE TABLESPACE", "ALTER TABLESPACE")):
                _make_tablespace(connection, line)
    return made


def _make_roles(connection: Connection, postgres: Postgres, lines: Sequence[str], existing: Sequence[str]) -> MadeRoles:
    """In one transaction, so that a run that is killed leaves none or all of them."""
    quoted = {str(execute(connection, "SELECT quote_ident(%s)", role)[0][0]) for role in existing}
    there = {f"CREATE ROLE {role};" for role in quoted}
    if not [line for line in lines if line.startswith("CREATE ROLE ") and line not in there]:
        return MadeRoles((), ())
    with connection.transaction():
        for line in lines:
            if line.startswith(("CREATE ROLE", "ALTER ROLE", "GRANT")) and line not in there:
                connection.execute(line.encode())
        if postgres.user not in existing:
            secret = postgres.password.get_secret_value().encode()
            hashed = connection.pgconn.encrypt_password(secret, postgres.user.encode(), b"scram-sha-256").decode()
            connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(postgres.user), hashed))
        rows = execute(connection, _LOGINS, list(existing))
    return MadeRoles(tuple(str(name) for name, _ in rows), tuple(str(name) for name, lacks in rows if lacks))


_LOGINS = """
SELECT rolname, rolcanlogin AND rolpassword IS NULL FROM pg_authid
WHERE rolname !~ '^pg_' AND rolname <> ALL (%s) ORDER BY 1
"""


def _make_tablespace(connection: Connection, statement: str) -> None:
    try:
        connection.execute(statement.encode())
    except psycopg.errors.DuplicateObject:
        return
    except (psycopg.errors.UndefinedFile, psycopg.errors.ObjectInUse) as error:
        raise OpsError(
            f"a tablespace cannot be made: {error.diag.message_primary}",
            "create that directory, empty and the server's user's, and launch this again",
        ) from None


def drop(connection: Connection, database: str) -> None:
    """Drop a database beside the live one; backends of a killed pg_restore live on for seconds, so FORCE."""
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))


def oid_of(connection: Connection, database: str) -> int:
    """A database's OID, 0 where there is none of that name."""
    rows = execute(connection, "SELECT oid FROM pg_database WHERE datname = %s", database)
    return int(rows[0][0]) if rows else 0


def default_jobs() -> int:
    """Workers for dump and restore."""
    return max(2, min(8, os.cpu_count() or 2))


def check_jobs(jobs: int) -> int:
    """`jobs` of a form, 0 meaning one per core.

    Raises:
        OpsError: out of bounds (the form's own check can be switched off).
    """
    if not 0 <= jobs <= 32:
        raise OpsError(f"jobs is {jobs}", "choose 0 (one per core) to 32")
    return jobs or default_jobs()
