"""Copies of backups in a second store: made of the very bytes of the first, proven by reading them back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import action, probe
from tasks import catalogue
from tasks.catalogue import VERIFIED, Backup
from tasks.manifest import MANIFEST, SEAL, Kind
from tasks.stores.store import Store

TRANSIT = ".transit-"


@dataclass(frozen=True)
class Gap:
    """What a second store lacks of an environment's backups of one kind, oldest first; what it has; the names of those
    that it has with another manifest; the backups that were verified since their copy was made; and copies whose
    manifest cannot be read."""

    kind: Kind
    missing: tuple[Backup, ...]
    there: tuple[Backup, ...]
    different: tuple[str, ...]
    unreadable: tuple[str, ...]
    verified_since: tuple[Backup, ...]
    bad_copies: tuple[str, ...]


@dataclass(frozen=True)
class Copied:
    """A backup that is in the second store now."""

    name: str
    bytes: int
    seconds: float


@probe
def read_gap(first: Store, second: Store, kind: Kind, environment: str) -> Gap:
    """Compare two stores by manifest.

    Raises:
        OpsError: they are the same place.
    """
    if first.where == second.where:
        raise OpsError(f"both stores are {first.where}", "give [copies] another place, best in another region")
    backups, unreadable = catalogue.open_all(first, kind)
    own = [backup for backup in backups if backup.manifest.environment == environment]
    readable, bad = catalogue.open_all(second, kind)
    copies = {backup.name: backup for backup in readable}
    return Gap(
        kind,
        tuple(backup for backup in own if backup.name not in copies and backup.name not in bad),
        tuple(copies[backup.name] for backup in own if _equal(backup, copies.get(backup.name))),
        tuple(b.name for b in own if b.name in copies and not _equal(b, copies[b.name])),
        tuple(unreadable),
        tuple(b for b in own if b.verified and _equal(b, copies.get(b.name)) and not copies[b.name].verified),
        tuple(backup.name for backup in own if backup.name in bad),
    )


def _equal(backup: Backup, copy: Backup | None) -> bool:
    return copy is not None and backup.manifest == copy.manifest


@action(idempotent=True)
def copy_backup(backup: Backup, second: Store) -> Copied:
    """Copy one backup as it is stored, encrypted or not.

    Raises:
        VerificationFailed: the backup is not what its manifest says.
        OpsError, Unreachable: a store refuses or does not answer; launched again, it goes on.
    """
    started = time.monotonic()
    first, manifest = backup.store, backup.manifest
    directory = first.local(backup.name)
    transit = first.spool / f"{TRANSIT}{backup.name}"
    try:
        if directory is None:
            first.fetch(backup.name, manifest.files, transit)
            for path in (MANIFEST, SEAL):
                (transit / path).write_text(first.read(f"{backup.name}/{path}") or "", encoding="utf-8")
            directory = transit
        second.receive(directory, backup.name, manifest.environment, manifest.files)
    finally:
        shutil.rmtree(transit, ignore_errors=True)
    return Copied(backup.name, manifest.bytes, time.monotonic() - started)


@action(idempotent=True)
def prove_copy(backup: Backup, second: Store) -> int:
    """Read a new copy back to its end; returns its bytes. One that is bad is removed again.

    Raises:
        VerificationFailed: it is not what the manifest says.
    """
    manifest = backup.manifest
    if problems := second.damage(backup.name, manifest.files):
        second.remove(manifest.environment, backup.name)
        raise VerificationFailed(f"the copy of {backup.name} is bad: {problems[0]}", "it was removed; launch it again")
    note_verified(backup, second)
    return manifest.bytes


def note_verified(backup: Backup, second: Store) -> None:
    """A restore that was proven of the same bytes is proven of the copy."""
    if backup.verified and (told := backup.store.read(f"{VERIFIED}/{backup.name}.json")):
        second.write(f"{VERIFIED}/{backup.name}.json", told)


@probe
def read_copies(copies: Sequence[Backup]) -> tuple[str, ...]:
    """Read copies to their end; returns what is wrong with any, as sentences."""
    return tuple(
        f"{copy.name}: {problem}" for copy in copies for problem in copy.store.damage(copy.name, copy.manifest.files)
    )
