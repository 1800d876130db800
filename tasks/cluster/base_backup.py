"""Base backups: taken by pg_basebackup, full or incremental, and verified before they are offered.

https://www.postgresql.org/docs/current/app-pgbasebackup.html
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.backups import codec
from tasks.backups.catalogue import Backup
from tasks.backups.encryption import ENDING, decrypt_files
from tasks.backups.manifest import FileSum, sum_of
from tasks.cluster.content import ClusterContent
from tasks.cluster.postgres_manifest import (
    CONTROL,
    MANIFEST,
    WAL_FOLDER,
    FileComparison,
    PostgresManifest,
    verify_wal,
)
from tasks.cluster.unpack import BASE, HashedReader, digest_of, members, write
from tasks.stores.directory import told

INCREMENTAL_VERSION = 17


class NoSummaries(CommandFailed):
    """No incremental backup is possible: the server has no WAL summaries since the previous backup, or refuses it."""


@dataclass(frozen=True)
class BaseBackupSource:
    """The server of a base backup. `tablespaces`: without the two built-in ones; `bytes`: of all databases."""

    version: int
    system: int
    segment_bytes: int
    summarizes: bool
    checksums: bool
    fsync: bool
    may_replicate: bool
    tablespaces: tuple[str, ...]
    bytes: int
    in_recovery: bool

    @property
    def major(self) -> int:
        """18."""
        return self.version // 10000


@dataclass(frozen=True)
class TakenBaseBackup:
    """A base backup in a directory, how long it took, and how long it took to verify it. `files`: the size and SHA-256
    of each file, if they are known."""

    content: ClusterContent
    seconds: float
    verify_seconds: float
    files: Mapping[str, FileSum] = field(default_factory=dict)


@probe
def read_source(postgres: Postgres) -> BaseBackupSource:
    """Read what a base backup depends on.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        row = execute(connection, _SOURCE)[0]
        tablespaces = execute(connection, "SELECT spcname FROM pg_tablespace WHERE spcname !~ '^pg_' ORDER BY 1")
    version, system, segment, summarize, checksums, fsync, replicates, whole, recovering = row
    names = tuple(str(name) for (name,) in tablespaces)
    return BaseBackupSource(
        int(version),
        int(str(system)),
        int(segment),
        summarize == "on",
        checksums == "on",
        fsync == "on",
        bool(replicates),
        names,
        int(whole),
        bool(recovering),
    )


_SOURCE = """
SELECT current_setting('server_version_num'), (SELECT system_identifier FROM pg_control_system()),
       pg_size_bytes(current_setting('wal_segment_size')), current_setting('summarize_wal', true),
       current_setting('data_checksums'), current_setting('fsync'), rolsuper OR rolreplication,
       (SELECT sum(pg_database_size(oid)) FROM pg_database), pg_is_in_recovery()
FROM pg_roles WHERE rolname = current_user
"""


@action
def take_base(
    postgres: Postgres, source: BaseBackupSource, directory: Path, base: Backup | None = None
) -> TakenBaseBackup:
    """Copy the running cluster into a directory as one compressed tar, with the WAL that the copy needs. Then read the
    stored copy, and compare every file with PostgreSQL's manifest. `base`: copy only what changed since that backup.

    pg_basebackup sends the files uncompressed; this process compresses them with more than one thread. Until the end, a
    temporary slot keeps the WAL that is sent last.

    Raises:
        CommandFailed: pg_basebackup failed.
        VerificationFailed: the copy is not what the server sent.
        OpsError: the disk is full.
    """
    argv = [
        *(postgres.program("pg_basebackup"), "--pgdata=-", "--format=tar", "--wal-method=fetch", "--checkpoint=fast"),
        *("--manifest-checksums=SHA256", "--no-password", "--no-sync", f"--label=interview-ops {directory.name}"),
    ]
    earlier = directory.with_name(f"{directory.name}.base")
    try:
        if base:
            argv.append(f"--incremental={manifest_of(base, earlier)}")
        started = time.monotonic()
        with _wal_kept(postgres):
            _run(postgres, source, directory, argv)
        seconds = time.monotonic() - started
    finally:
        shutil.rmtree(earlier, ignore_errors=True)
    failpoint("base backup: copied")
    started = time.monotonic()
    try:
        stored = verify_base(postgres, directory)
    except VerificationFailed as error:
        raise VerificationFailed(
            f"the backup differs from what the server sent: {error.message}", "run it again"
        ) from None
    verifying = time.monotonic() - started
    content = _content(postgres, source, directory, base)
    files = {BASE: stored, MANIFEST: sum_of(directory / MANIFEST)}
    return TakenBaseBackup(content, seconds, verifying, files)


@contextlib.contextmanager
def _wal_kept(postgres: Postgres) -> Iterator[None]:
    """Keep the server's WAL from now on: it is sent after the files, and checkpoints meanwhile would delete it.

    https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
    """
    with postgres.connect() as connection:
        name = f"ops_base_backup_{os.getpid()}_{secrets.token_hex(4)}"
        execute(connection, "SELECT pg_create_physical_replication_slot(%s, true, true)", name)  # temporary
        yield


def _run(postgres: Postgres, source: BaseBackupSource, directory: Path, argv: list[str]) -> None:
    received = 0

    def tell() -> WorkDone:
        return WorkDone(f"{size(received)} of {size(source.bytes)} received", 0.0)

    def take(chunk: bytes) -> None:
        nonlocal received
        received += len(chunk)
        packed.write(chunk)

    try:
        with progress(tell), told(directory / BASE), codec.writer(directory / BASE) as packed:
            stall = shell.Stall(postgres.stall_seconds)
            shell.drain(argv, take, environment=postgres.environment(), stall=stall, hint="nothing was published")
    except CommandFailed as error:
        if "incremental" in error.stderr or "WAL summaries" in error.stderr:
            hint = "take a full backup (kind=full): the server no longer knows what changed since that one"
            raise NoSummaries(argv, error.exit_code, error.stderr, hint) from None
        raise


def _content(postgres: Postgres, source: BaseBackupSource, directory: Path, base: Backup | None) -> ClusterContent:
    described = PostgresManifest.read(directory)
    stopped, next_xid, databases = read_moment(postgres)
    if (described.system or source.system) != source.system:
        raise VerificationFailed("the copy is from another cluster than the server", "run it again")
    return ClusterContent(
        form="incremental" if base else "full",
        base=base.name if base else "",
        system=source.system,
        timeline=described.wal[-1].timeline,
        start_lsn=described.wal[0].start,
        stop_lsn=described.wal[-1].end,
        stopped=stopped,
        next_xid=next_xid,
        server_version=source.version,
        segment_bytes=source.segment_bytes,
        bytes=described.bytes if base is None else source.bytes,
        database=postgres.database,
        databases=databases,
    )


def read_moment(postgres: Postgres) -> tuple[datetime, int, tuple[str, ...]]:
    """Read the server's time, the next transaction ID, and the databases without templates."""
    with postgres.connect() as connection:
        at, next_xid, databases = execute(connection, _MOMENT)[0]
    return at.astimezone(UTC), int(next_xid), tuple(databases)


_MOMENT = """
SELECT clock_timestamp(), pg_snapshot_xmax(pg_current_snapshot())::text,
       (SELECT array_agg(datname::text ORDER BY datname) FROM pg_database WHERE NOT datistemplate)
"""


def manifest_of(backup: Backup, target: Path) -> Path:
    """PostgreSQL's manifest of a stored backup, decrypted on this host.

    Raises:
        VerificationFailed: it is damaged.
    """
    stored, manifest = backup.store.local(backup.name), backup.manifest
    name = MANIFEST + (ENDING if manifest.clear else "")
    if stored is None:
        stored = target / "stored"
        backup.store.fetch(backup.name, {name: manifest.files[name]}, stored)
    if not manifest.clear:
        return stored / MANIFEST
    if problems := decrypt_files(stored, target, {MANIFEST: manifest.clear[MANIFEST]}, backup.store.key):
        raise VerificationFailed(problems[0], "take a full backup")
    return target / MANIFEST


def verify_base(postgres: Postgres, directory: Path) -> FileSum:
    """Read a stored copy to its end, as a restore does. Compare every file with PostgreSQL's manifest, which is put
    next to it, and read the WAL that the copy needs with pg_waldump. That proves what pg_verifybackup proves, without a
    second copy on the disk. Returns the size and the SHA-256 of the stored copy.

    Raises:
        VerificationFailed: it differs from what the server sent.
        OpsError: the cause is this host.
    """
    wal = directory.with_name(f"{directory.name}.verify")
    try:
        with told(wal):
            wal.mkdir(mode=0o700)
        with told(directory / BASE):
            file = inside.reading(directory / BASE)
        with file:
            stored = HashedReader(file)
            files, text = _read_back(directory / BASE, cast(IO[bytes], stored), wal)
        manifest = PostgresManifest.parse(text)
        if why := files.problem(manifest):
            raise VerificationFailed(why, "run it again")
        verify_wal(postgres, wal, manifest.wal)
        with told(directory / MANIFEST):
            inside.write(directory / MANIFEST, text)
        return stored.sum
    finally:
        shutil.rmtree(wal, ignore_errors=True)


def _read_back(archive: Path, stored: IO[bytes], wal: Path) -> tuple[FileComparison, bytes]:
    files, manifest = FileComparison(), b""
    with members(archive, codec.UNBOUNDED, stored) as found:
        for member, content in found:
            name = member.name
            if name == MANIFEST:
                manifest = content.read()
            elif name == CONTROL:
                files.control = content.read()
                files.add(name, len(files.control), hashlib.sha256(files.control).hexdigest())
            elif member.isreg() and name.startswith(WAL_FOLDER):
                if "/" not in (segment := name.removeprefix(WAL_FOLDER)):
                    write(wal / segment, 0o600, content)
            elif member.isreg():
                files.add(name, *digest_of(content))
    return files, manifest
