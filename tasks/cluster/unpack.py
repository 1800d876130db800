"""A data directory built from a base backup and those that it depends on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OTHER_BACKUPS, CommandFailed, OpsError, VerificationFailed
from runbook.failpoint import failpoint
from tasks.backups.catalogue import Backup
from tasks.stores.directory import told

MANIFEST = "backup_manifest"
BASE, WAL = "base.tar.gz", "pg_wal.tar.gz"
_REFUSED_HERE = re.compile(
    "Permission denied|Operation not permitted|Cannot allocate memory|out of memory|Read-only file system|quota"
    "|Cannot exec|Too many open files"
)


def require_health(error: CommandFailed, what: str, directory: Path) -> None:
    """Check that a program failed because of the backup, not because of this host: tar and PostgreSQL's programs exit
    with the same code for both.

    Raises:
        OpsError: the cause is this host: disk space, permissions or memory, or the program was killed.
    """
    if "No space left" in error.stderr:
        raise OpsError(f"the disk is full at {directory}", f"free disk space there; {directory} is deleted") from None
    if error.exit_code < 0:
        ended = f"{Path(error.argv[0]).name} was killed by signal {-error.exit_code}"
        hint = "check this host's memory (the kernel log names killed processes), then run it again"
        raise OpsError(f"{what}: {ended}", hint) from None
    if _REFUSED_HERE.search(error.stderr):
        hint = "correct the permissions there, or this host's limits, then run it again"
        raise OpsError(f"{what}: {error.message}", hint) from None


def extract(archive: Path, target: Path, *more: str) -> None:
    """Extract a compressed tar, or only its members `more`.

    Raises:
        VerificationFailed: it is damaged.
        OpsError: the cause is this host.
    """
    argv = ["tar", "--extract", "--gzip", f"--file={archive}", f"--directory={target}", "--no-same-owner", *more]
    try:
        shell.run(argv, environment={"LC_ALL": "C"})
    except CommandFailed as error:
        require_health(error, f"{archive.name} cannot be unpacked into {target}", target)
        raise VerificationFailed(f"{archive.name} cannot be unpacked: {error.message}", OTHER_BACKUPS) from None


def unpack_tar(source: Path, data: Path, *, wal: bool = True) -> None:
    """Extract both tars of a backup into an empty directory.

    Raises:
        VerificationFailed: one is damaged.
        OpsError: the cause is this host.
    """
    for name, target in ((BASE, data), (WAL, data / "pg_wal")) if wal else ((BASE, data),):
        with told(target):
            target.mkdir(mode=0o700, exist_ok=True)
        extract(source / name, target)


def build_data(postgres: Postgres, lineage: Sequence[Backup], root: Path) -> Path:
    """Build the data directory of a fetched backup and those that it depends on as `root/data`, owned by the server's
    user.

    Raises:
        VerificationFailed: one is damaged, or they do not fit together.
        OpsError: the cause is this host.
    """
    data = root / "data"
    if len(lineage) == 1:
        unpack_tar(lineage[0].path, data)
        give(data, postgres.os_user)
        return data
    parts = []
    for number, backup in enumerate(lineage):
        part = root / f"part-{number}"
        unpack_tar(backup.path, part, wal=backup is lineage[-1])
        shutil.copyfile(backup.path / MANIFEST, part / MANIFEST)
        give(part, postgres.os_user)
        parts.append(part)
    failpoint("cluster: parts unpacked")
    try:
        shell.run(
            [postgres.program("pg_combinebackup"), *parts, f"--output={data}", "--no-sync"],
            user=postgres.os_user,
            environment={"LC_ALL": "C"},
            directory=root,
        )
    except CommandFailed as error:
        require_health(error, f"{lineage[-1].name} cannot be combined in {data}", data)
        raise VerificationFailed(
            f"{', '.join(one.name for one in lineage)} do not fit together: {error.message}", OTHER_BACKUPS
        ) from None
    for part in parts:
        shutil.rmtree(part)
    return data


def give(path: Path, user: str) -> None:
    """Give everything below to the server's user, if this process may."""
    if os.geteuid() == 0:
        uid, gid = shell.owner_of(user)
        shell.run(["chown", "--recursive", "--no-dereference", f"{uid}:{gid}", str(path)])
