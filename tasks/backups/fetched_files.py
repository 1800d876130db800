"""A backup's files on this host, decrypted and proven by their checksums, until the run ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Mapping, Sequence

from runbook.errors import OpsError, VerificationFailed
from runbook.guard.process import is_abandoned
from runbook.kinds import probe
from runbook.units import size
from tasks.backups import manifest as manifests
from tasks.backups.catalogue import AT_HAND, Backup, hand_of
from tasks.backups.encryption import ENDING, decrypt_files
from tasks.backups.manifest import FileSum
from tasks.host.disk import disk_of
from tasks.stores.directory import told
from tasks.stores.store import Store


@probe
def verify_files(backup: Backup, only: Collection[str] | None = None) -> Sequence[str]:
    """Read a backup's files and compare them with the manifest; returns the problems as sentences.

    Files in a bucket are downloaded and encrypted files are decrypted; `put_away` deletes both.

    Args:
        only: the names, in clear, of the files that are needed; None: every file

    Raises:
        OpsError: there is not enough free disk space for them here, or no key.
    """
    store, manifest = backup.store, backup.manifest.whole()
    clear = _chosen(manifest.clear, only)
    files = _chosen(manifest.files, only and [name + ENDING for name in only] if manifest.clear else only)
    stored = store.local(backup.name)
    if backup.path == stored:
        return manifests.damage(stored, manifest.files, only=only)
    _require_space(backup, clear, {} if stored else files)
    with told(backup.path):  # what an attempt before this one brought stays
        backup.path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    if stored is None:
        stored = backup.path.with_name("stored") if manifest.clear else backup.path
        try:
            store.fetch(backup.name, files, stored)
        except VerificationFailed as error:
            return [error.message]
    if problems := manifests.damage(stored, manifest.files, only=None if only is None else files):
        return problems
    return decrypt_files(stored, backup.path, clear, store.key) if clear else []


def _chosen(files: Mapping[str, FileSum], only: Collection[str] | None) -> dict[str, FileSum]:
    return {name: file for name, file in files.items() if only is None or name in only}


def _require_space(backup: Backup, *needed: Mapping[str, FileSum]) -> None:
    needed_bytes = sum(file.bytes for files in needed for file in files.values())
    disk = disk_of(backup.path)
    if disk.free_bytes < needed_bytes:
        raise OpsError(
            f"{backup.name} needs {size(needed_bytes)} in {backup.store.hands} and {size(disk.free_bytes)} are free",
            "free disk space there, or set [backups] spool to a larger disk",
        )


def put_away(backup: Backup) -> None:
    """Delete the files of a backup that this run fetched."""
    hand = hand_of(backup.store, backup.manifest.environment)
    shutil.rmtree(hand / backup.name, ignore_errors=True)
    with contextlib.suppress(OSError):  # another backup is still at hand
        hand.rmdir()


def sweep(store: Store) -> None:
    """Delete fetched files of dead processes of this host: they may be decrypted."""
    for path in store.hands.glob(f"{AT_HAND}*") if store.hands.is_dir() else ():
        with contextlib.suppress(OSError):  # another run removes it too
            if is_abandoned(path.name.rpartition(".")[2], path):
                shutil.rmtree(path, ignore_errors=True)
