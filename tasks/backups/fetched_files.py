"""A backup's files on this host and in clear, proven by their checksums, for as long as a run reads them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.guard.process import is_abandoned
from runbook.kinds import probe
from runbook.units import size
from tasks.backups import manifest as manifests
from tasks.backups.catalogue import AT_HAND, Backup, hand_of
from tasks.backups.encryption import decrypt_files
from tasks.backups.manifest import Manifest
from tasks.host.disk import disk_of
from tasks.stores.directory import told
from tasks.stores.store import Store


@probe
def verify_files(backup: Backup) -> Sequence[str]:
    """Read every file of a backup, compare it with the manifest, and have it at hand; returns what is wrong.

    What is elsewhere is brought here first, what is encrypted is decrypted: `put_away` removes both.

    Raises:
        OpsError: there is no room for it here, or no key.
    """
    store, manifest = backup.store, backup.manifest.whole()
    stored = store.local(backup.name)
    if backup.path == stored:
        return manifests.damage(stored, manifest.files)
    _require_room(backup, manifest, stored)
    with told(backup.path):  # what an attempt before this one brought stays
        backup.path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    if stored is None:
        stored = backup.path.with_name("stored") if manifest.clear else backup.path
        try:
            store.fetch(backup.name, manifest.files, stored)
        except VerificationFailed as error:
            return [error.message]
    if problems := manifests.damage(stored, manifest.files):
        return problems
    return decrypt_files(stored, backup.path, manifest.clear, store.key) if manifest.clear else []


def _require_room(backup: Backup, manifest: Manifest, stored: Path | None) -> None:
    clear = sum(file.bytes for file in manifest.clear.values())
    needed = clear + (0 if stored else manifest.bytes)
    disk = disk_of(backup.path)
    if disk.free_bytes < needed:
        raise OpsError(
            f"{backup.name} needs {size(needed)} in {backup.store.hands} and {size(disk.free_bytes)} are free",
            "free space there, or give [backups] spool more",
        )


def put_away(backup: Backup) -> None:
    """Remove what this run brought here of a backup."""
    hand = hand_of(backup.store, backup.manifest.environment)
    shutil.rmtree(hand / backup.name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another backup is still at hand
        hand.rmdir()


def sweep(store: Store) -> None:
    """Remove what dead processes of this host had at hand: it may be in clear."""
    for path in store.hands.glob(f"{AT_HAND}*") if store.hands.is_dir() else ():
        with contextlib.suppress(OSError):  # another run removes it too
            if is_abandoned(path.name.rpartition(".")[2], path):
                shutil.rmtree(path, ignore_errors=True)
