"""A backup's files on this host and in clear, proven by their checksums, for as long as a run reads them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import probe
from runbook.render import size
from tasks import manifest as manifests
from tasks.catalogue import AT_HAND, Backup
from tasks.encryption import decrypt_files
from tasks.host import disk_of


@probe
def verify_files(backup: Backup) -> Sequence[str]:
    """Read every file of a backup, compare it with the manifest, and have it at hand; returns what is wrong.

    What is elsewhere is brought here first, what is encrypted is decrypted: `put_away` removes both.

    Raises:
        OpsError: there is no room for it here, or no key.
    """
    store, manifest = backup.store, backup.manifest
    stored = store.local(backup.name)
    if backup.path == stored:
        return manifests.damage(stored, manifest.files)
    _require_room(backup, stored)
    backup.path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)  # what an attempt before this one brought stays
    if stored is None:
        stored = backup.path.with_name("stored") if manifest.clear else backup.path
        try:
            store.fetch(backup.name, manifest.files, stored)
        except VerificationFailed as error:
            return [error.message]
    if problems := manifests.damage(stored, manifest.files):
        return problems
    return decrypt_files(stored, backup.path, manifest.clear, store.key) if manifest.clear else []


def _require_room(backup: Backup, stored: Path | None) -> None:
    clear = sum(file.bytes for file in backup.manifest.clear.values())
    needed = clear + (0 if stored else backup.manifest.bytes)
    disk = disk_of(backup.path)
    if disk.free_bytes < needed:
        raise OpsError(
            f"{backup.name} needs {size(needed)} in {backup.store.spool} and {size(disk.free_bytes)} are free",
            "free space there, or give [backups] spool more",
        )


def put_away(backup: Backup) -> None:
    """Remove what was brought here of a backup, and what dead runs left of theirs."""
    spool = backup.store.spool
    for path in spool.glob(f"{AT_HAND}*-*") if spool.is_dir() else ():
        owner = path.name.rpartition("-")[2]
        if path.name == f"{AT_HAND}{backup.manifest.environment}-{os.getpid()}":
            shutil.rmtree(path / backup.name, ignore_errors=True)
            with contextlib.suppress(OSError):  # another backup is still at hand
                path.rmdir()
        elif owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)
