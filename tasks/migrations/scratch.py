"""A scratch copy of the application's database for rehearsals. The live one is only read.

pg_dump feeds pg_restore through a pipe, so that no file with personal data remains, even after a crash.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from typing import IO

from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.postgres.dump.dump import NICE
from tasks.postgres.restore.staged_copy import drop, name_beside, oid_of
from tasks.postgres.server.properties import apply_properties, creation, read_properties

SUFFIX = "__rehearsal"
# pg_dump's lock request blocks later queries while it waits for an ALTER TABLE, so it gives up early.
LOCK_WAIT = "10s"
HINT = "run this again. The live database is unchanged"


def scratch_name(database: str) -> str:
    """The reserved name of the scratch copy; a leftover under it is dropped."""
    return name_beside(database, SUFFIX)


@action(idempotent=True)
def create_rehearsal(postgres: Postgres) -> str:
    """An empty database under the reserved name, with the live one's owner, locale, privileges and settings."""
    name = scratch_name(postgres.database)
    with postgres.connect() as connection:
        drop(postgres, connection, name)
        properties = read_properties(connection, postgres.database)
        connection.execute(creation(name, properties))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
        apply_properties(connection, name, properties.model_copy(update={"comment": "", "connection_limit": -1}))
    return name


@action(idempotent=True)
def drop_rehearsal(postgres: Postgres) -> str:
    """Drop the scratch copy."""
    name = scratch_name(postgres.database)
    with postgres.connect() as connection:
        drop(postgres, connection, name)
    return name


@action
def fill_rehearsal(postgres: Postgres, scratch: str) -> float:
    """Copy the live database into it in one snapshot, and analyse it; returns the seconds.

    Subscriptions are left out: a copied one would receive the live one's changes.

    Raises:
        CommandFailed: pg_dump or pg_restore failed.
    """
    with postgres.connect() as connection:
        live = oid_of(connection, postgres.database)
        whole = int(execute(connection, "SELECT pg_database_size(%s::oid)", live)[0][0])

    def copied() -> WorkDone:
        with postgres.connect() as connection:
            now = int(execute(connection, "SELECT pg_database_size(%s::oid)", oid_of(connection, scratch))[0][0])
        return WorkDone(f"{scratch}: {size(now)} of about {size(whole)} copied", now / max(whole, 1))

    with progress(copied):
        seconds = _pipe(postgres, scratch)
        failpoint("rehearsal: copy filled")
        with postgres.connect(scratch) as connection:
            execute(connection, "ANALYZE")
    return seconds


@action
def fill_schema(postgres: Postgres, scratch: str) -> float:
    """Copy the live database's definitions into it, without rows; returns the seconds.

    Raises:
        CommandFailed: pg_dump or pg_restore failed.
    """
    return _pipe(postgres, scratch, "--schema-only")


def _pipe(postgres: Postgres, scratch: str, *options: str) -> float:
    dump = [
        *(postgres.program("pg_dump"), "--format=custom", "--compress=0", "--no-password", "--no-subscriptions"),
        *(f"--lock-wait-timeout={LOCK_WAIT}", *options),
    ]
    restore = [
        *(postgres.program("pg_restore"), "--format=custom", "--exit-on-error", "--no-password"),
        *("--enable-row-security", "--dbname", scratch),
    ]
    settings = "-c synchronous_commit=off -c default_transaction_read_only=off"
    source = {**postgres.environment(), "PGDATABASE": postgres.database}
    target = postgres.environment(options=settings)
    with (
        tempfile.TemporaryFile() as errors,
        shell.spawn(dump, environment=source, nice=NICE, stdout=subprocess.PIPE, stderr=errors) as dumping,
    ):
        assert dumping.stdout
        try:
            done = shell.feed(restore, dumping.stdout, environment=target, stall=postgres.stall(scratch), hint=HINT)
        except CommandFailed:
            with contextlib.suppress(subprocess.TimeoutExpired):  # still running: it is not the cause
                _require_success(dump, dumping.wait(1.0), errors)
            raise
        _require_success(dump, dumping.wait(), errors)
    return done.seconds


def _require_success(argv: list[str], code: int, errors: IO[bytes]) -> None:
    if code:
        errors.seek(0)
        raise CommandFailed(argv, code, errors.read().decode(errors="replace"), HINT)
