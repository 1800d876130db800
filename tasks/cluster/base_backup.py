"""Base backups: taken by pg_basebackup, full or incremental, and verified before they are offered.

https://www.postgresql.org/docs/current/app-pgbasebackup.html
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.backups.catalogue import Backup
from tasks.backups.encryption import ENDING, decrypt_files
from tasks.cluster.content import ClusterContent
from tasks.cluster.unpack import MANIFEST, require_health, unpack_tar
from tasks.host.disk import disk_of
from tasks.stores.directory import told

INCREMENTAL_VERSION = 17
TAR_VERSION = 18
FULL_BYTES = 1 << 20


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
    """A base backup in a directory, how long it took, and how long it took to verify it."""

    content: ClusterContent
    seconds: float
    verify_seconds: float


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
    """Copy the running cluster into a directory, with the WAL that the copy needs, and verify it with PostgreSQL's
    manifest. `base`: copy only what changed since that backup.

    Raises:
        CommandFailed: pg_basebackup or pg_verifybackup failed.
        OpsError: the disk is full.
    """
    argv = [
        *(postgres.program("pg_basebackup"), f"--pgdata={directory}", "--format=tar", *_compress(source)),
        *("--wal-method=stream", "--checkpoint=fast", "--manifest-checksums=SHA256", "--no-password", "--no-sync"),
        f"--label=interview-ops {directory.name}",
    ]
    earlier = directory.with_name(f"{directory.name}.base")
    try:
        if base:
            argv.append(f"--incremental={manifest_of(base, earlier)}")
        started = time.monotonic()
        _run(postgres, source, directory, argv)
        seconds = time.monotonic() - started
    finally:
        shutil.rmtree(earlier, ignore_errors=True)
    failpoint("base backup: copied")
    content = _content(postgres, source, directory, base)
    started = time.monotonic()
    verify_base(postgres, source.major, directory)
    return TakenBaseBackup(content, seconds, time.monotonic() - started)


def _compress(source: BaseBackupSource) -> list[str]:
    """Compress on the client: the server's processor is for the application."""
    return ["--compress=client-gzip:1"]


def _run(postgres: Postgres, source: BaseBackupSource, directory: Path, argv: list[str]) -> None:
    def received() -> WorkDone:
        there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return WorkDone(f"{size(there)} of {size(source.bytes)} (uncompressed) received", 0.0)

    try:
        with progress(received):
            stall = shell.Stall(postgres.stall_seconds)
            shell.run(argv, environment=postgres.environment(), stall=stall, hint="nothing was published")
    except CommandFailed as error:
        if (free := disk_of(directory).free_bytes) < FULL_BYTES:
            raise OpsError(f"the store is full: {size(free)} free", f"free space at {directory.parent}") from None
        if "incremental" in error.stderr or "WAL summaries" in error.stderr:
            hint = "take a full backup (kind=full): the server no longer knows what changed since that one"
            raise NoSummaries(argv, error.exit_code, error.stderr, hint) from None
        raise


def _content(postgres: Postgres, source: BaseBackupSource, directory: Path, base: Backup | None) -> ClusterContent:
    described = _manifest(directory)
    ranges = described["WAL-Ranges"]
    with postgres.connect() as connection:
        stopped, next_xid = execute(
            connection, "SELECT clock_timestamp(), pg_snapshot_xmax(pg_current_snapshot())::text"
        )[0]
    if described.get("System-Identifier", source.system) != source.system:
        raise VerificationFailed("the copy is from another cluster than the server", "run it again")
    return ClusterContent(
        form="incremental" if base else "full",
        base=base.name if base else "",
        system=source.system,
        timeline=int(ranges[-1]["Timeline"]),
        start_lsn=str(ranges[0]["Start-LSN"]),
        stop_lsn=str(ranges[-1]["End-LSN"]),
        stopped=stopped.astimezone(UTC),
        next_xid=int(next_xid),
        server_version=source.version,
        segment_bytes=source.segment_bytes,
        bytes=sum(int(file["Size"]) for file in described["Files"]) if base is None else source.bytes,
        database=postgres.database,
    )


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise VerificationFailed(f"the backup has no readable {MANIFEST}: {error}", "run it again") from None


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


def verify_base(postgres: Postgres, major: int, directory: Path) -> None:
    """pg_verifybackup: compare every file with PostgreSQL's manifest, and read the WAL that the copy needs. Before
    version 18 it reads no tar files: they are unpacked for it.

    Raises:
        VerificationFailed: it differs from what the server sent.
        OpsError: the cause is this host.
    """
    program, plain = postgres.program("pg_verifybackup"), directory.with_name(f"{directory.name}.verify")
    try:
        if major >= TAR_VERSION:
            argv = [program, "--format=tar", "--no-parse-wal", "--exit-on-error", str(directory)]
        else:
            with told(plain):
                plain.mkdir(mode=0o700)
            unpack_tar(directory, plain)
            shutil.copyfile(directory / MANIFEST, plain / MANIFEST)
            argv = [program, "--exit-on-error", str(plain)]
        shell.run(argv, environment={"LC_ALL": "C"})
    except CommandFailed as error:
        require_health(error, "the backup cannot be verified", directory)
        raise VerificationFailed(
            f"the backup differs from what the server sent: {error.message}", "run it again"
        ) from None
    finally:
        shutil.rmtree(plain, ignore_errors=True)
