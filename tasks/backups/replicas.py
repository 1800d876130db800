"""Copies of backups in a second store: made of the very bytes of the first, proven by reading them back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import action, probe
from runbook.units import size
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup, note_of
from tasks.backups.manifest import MANIFEST, SEAL, Kind
from tasks.host.disk import disk_of
from tasks.stores.directory import TRANSIT, told
from tasks.stores.store import Store


@dataclass(frozen=True)
class Gap:
    """What a second store lacks of an environment's backups of one kind, oldest first; what it has; the names of those
    that it has with another manifest; the backups whose copy nobody has judged and that are verified; and copies whose
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
        raise OpsError(f"both stores are {first.where}", "set [copies] to another store, preferably in another region")
    backups, unreadable = catalogue.open_all(first, kind)
    own = [
        backup
        for backup in backups
        # pgBackRest replicates its own to its other repositories: what is here only tells of them.
        if backup.manifest.environment == environment
        and not (kind == "cluster" and backup.manifest.content.get("label"))
    ]
    readable, bad = catalogue.open_all(second, kind)
    copies = {backup.name: backup for backup in readable}
    return Gap(
        kind,
        tuple(backup for backup in own if backup.name not in copies and backup.name not in bad),
        tuple(copies[backup.name] for backup in own if _equal(backup, copies.get(backup.name))),
        tuple(b.name for b in own if b.name in copies and not _equal(b, copies[b.name])),
        tuple(unreadable),
        tuple(b for b in own if b.verified and _equal(b, copies.get(b.name)) and not _is_judged(copies[b.name])),
        tuple(backup.name for backup in own if backup.name in bad),
    )


def _equal(backup: Backup, copy: Backup | None) -> bool:
    return copy is not None and backup.manifest == copy.manifest


def _is_judged(copy: Backup) -> bool:
    return bool(copy.verified or copy.failed)


@action(idempotent=True)
def copy_backup(backup: Backup, second: Store) -> Copied:
    """Bring one backup to a second store as it is stored, encrypted or not. It is a copy once `prove_copy` says so.

    Raises:
        VerificationFailed: the backup is not what its manifest says.
        OpsError, Unreachable: a store refuses or does not answer; launched again, it goes on where it was.
    """
    started = time.monotonic()
    first, manifest = backup.store, backup.manifest
    source = _source_of(backup)
    try:
        if first.local(backup.name) is None:
            _require_room(backup, source)
            first.fetch(backup.name, manifest.files, source)
            with told(source):
                for path in (MANIFEST, SEAL):
                    (source / path).write_text(first.read(f"{backup.name}/{path}") or "", encoding="utf-8")
        second.receive(source, backup.name, manifest.environment, manifest.files)
    except VerificationFailed:
        _end_transit(backup)
        raise
    return Copied(backup.name, manifest.bytes, time.monotonic() - started)


@action(idempotent=True)
def prove_copy(backup: Backup, second: Store) -> int:
    """Read a new copy back to its end, and only then give it its name; returns its bytes. One that is bad is removed.

    Raises:
        VerificationFailed: it is not what the manifest says.
        OpsError, Unreachable: as `copy_backup`.
    """
    manifest = backup.manifest
    problems = second.accept(_source_of(backup), backup.name, manifest.environment, manifest.files)
    if not problems:
        second.forget(note_of(backup.name))  # of a copy before this one
        note_verified.work(backup, second)
    _end_transit(backup)
    if problems:
        raise VerificationFailed(
            f"the copy of {backup.name} is damaged: {problems[0]}", "run it again: the damaged copy was deleted"
        )
    return manifest.bytes


@action(idempotent=True)
def note_verified(backup: Backup, second: Store) -> None:
    """A restore that was proven of the same bytes is proven of the copy: for one that was read back just now."""
    if backup.verified and (noted := backup.store.read(note_of(backup.name))):
        second.write(note_of(backup.name), noted)


@probe
def read_copies(copies: Sequence[Backup]) -> dict[str, str]:
    """Read copies to their end; returns the names of those that are not what their manifest says, and why not."""
    found = {copy.name: copy.store.damage(copy.name, copy.manifest.files) for copy in copies}
    return {name: problems[0] for name, problems in found.items() if problems}


def _source_of(backup: Backup) -> Path:
    """The directory of this host from which a backup is copied; it stays until the copy is proven."""
    return backup.store.local(backup.name) or backup.store.spool / f"{TRANSIT}{backup.name}"


def _end_transit(backup: Backup) -> None:
    shutil.rmtree(backup.store.spool / f"{TRANSIT}{backup.name}", ignore_errors=True)


def _require_room(backup: Backup, transit: Path) -> None:
    there = sum(path.stat().st_size for path in transit.rglob("*") if path.is_file())
    needed, free = backup.manifest.bytes - there, disk_of(transit).free_bytes
    if free < needed:
        raise OpsError(
            f"{backup.name} needs {size(needed)} on its way in {transit.parent} and {size(free)} are free",
            "free disk space there, or set [backups] spool to a larger disk",
        )
