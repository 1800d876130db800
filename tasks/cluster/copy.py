"""A base backup built as a private instance, and a read of all its rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres.server import Postgres, execute, first_line
from blocks.postgres.wal import Wal
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, OpsError, VerificationFailed
from runbook.files import inside
from runbook.kinds import action, probe
from tasks.backups.catalogue import Backup
from tasks.cluster.content import cluster_in
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.postgres_manifest import MANIFEST, WAL_FOLDER, PostgresManifest, verify_wal
from tasks.cluster.tablespaces import outside_links
from tasks.cluster.unpack import build_data
from tasks.pgbackrest.backup import build_from_label
from tasks.stores.directory import told


@dataclass(frozen=True)
class BuiltCluster:
    """A data directory, and the seconds that it took."""

    data: Path
    seconds: float


@dataclass(frozen=True)
class Read:
    """Databases with their tables and rows; `problems`: what could not be read."""

    rows: tuple[tuple[str, int, int], ...]
    problems: tuple[str, ...]


@action
def build_instance(
    instance: PrivateInstance, lineage: Sequence[Backup], *, verify: bool = False, wal: Wal | None = None
) -> BuiltCluster:
    """Build the data directory of a fetched backup, or of one in pgBackRest's repository (`wal`), which verifies every
    file on restore. Every file of a fetched one is compared with PostgreSQL's manifest while it
    is written. `verify`: its WAL is read too, and what was combined from several backups is compared again.

    Raises:
        VerificationFailed: it is incomplete or damaged.
        OpsError: the disk is full.
    """
    started = time.monotonic()
    content = cluster_in(lineage[-1])
    if content.label:
        data = build_from_label(instance, _require(wal), content)
        _require_inside(lineage[-1], data)
        return BuiltCluster(data, time.monotonic() - started)
    data = build_data(instance.postgres, lineage, instance.root)
    seconds = time.monotonic() - started
    if verify:
        _verify(instance, lineage, data)
    _require_inside(lineage[-1], data)
    return BuiltCluster(data, seconds)


def _require_inside(backup: Backup, data: Path) -> None:
    """A base backup with tablespaces would use the live server's directories; `backup-cluster` takes none."""
    listed = data / "tablespace_map"  # pg_basebackup writes an empty one
    with told(data):
        if outside_links(data) or (listed.exists() and inside.read(listed).strip()):
            raise OpsError(f"{backup.name} has tablespaces outside its data directory", OTHER_BACKUPS)
        listed.unlink(missing_ok=True)


def _verify(instance: PrivateInstance, lineage: Sequence[Backup], data: Path) -> None:
    """A single backup was compared with PostgreSQL's manifest when it was unpacked; its WAL is left to read. What was
    combined from several has a manifest of its own."""
    try:
        if len(lineage) == 1:
            verify_wal(instance.postgres, data / WAL_FOLDER, PostgresManifest.read(lineage[0].path).wal)
            return
        program = instance.postgres.program("pg_verifybackup")
        argv = [program, "--exit-on-error", f"--manifest-path={data / MANIFEST}", str(data)]
        shell.run(argv, environment={"LC_ALL": "C", "PATH": _path(instance.postgres)})
    except CommandFailed as error:
        raise VerificationFailed(f"{lineage[-1].name} is damaged: {error.message}", OTHER_BACKUPS) from None


def _require(wal: Wal | None) -> Wal:
    if wal is None or wal.tool != "pgbackrest":
        raise OpsError(
            "this backup is in pgBackRest's repository, and the environment does not use it",
            "set tool, stanza and config in [wal] of its TOML",
        )
    return wal


def _path(postgres: Postgres) -> str:
    """pg_verifybackup searches pg_waldump in its directory, then in PATH."""
    return f"{postgres.programs}:/usr/bin:/bin"


@probe
def read_whole(postgres: Postgres) -> Read:
    """Read every row of every table and materialised view in every database. An unreadable page is a problem."""
    rows, problems = list[tuple[str, int, int]](), list[str]()
    with postgres.connect() as connection:
        names = [str(name) for (name,) in execute(connection, _DATABASES)]
    for name in names:
        tables, count = 0, 0
        with postgres.connect(name) as connection:
            for schema, table in execute(connection, _TABLES):
                what = sql.SQL("SELECT count(*), sum(length(t::text)) FROM {} t").format(sql.Identifier(schema, table))
                try:
                    count += int(execute(connection, what)[0][0])
                except psycopg.Error as error:
                    problems.append(f"{name}: {schema}.{table}: {first_line(error)}")
                tables += 1
        rows.append((name, tables, count))
    return Read(tuple(rows), tuple(problems))


_DATABASES = "SELECT datname FROM pg_database WHERE datallowconn AND datname <> 'template1' ORDER BY 1"
_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND c.relispopulated ORDER BY 1, 2
"""
