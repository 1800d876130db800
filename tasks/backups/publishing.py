"""Backups on their way into a store: begun under a name that is free, sealed, offered; what killed runs left."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from zoneinfo import ZoneInfo

from runbook import clock
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.backups import manifest as manifests
from tasks.backups.catalogue import PREFIX, Backup, open_backup
from tasks.backups.encryption import encrypt_files
from tasks.backups.manifest import Kind, Manifest
from tasks.stores.directory import BAD, PARTIAL, SENT, TRANSIT, DirectoryStore, told
from tasks.stores.store import Store


@dataclass(frozen=True)
class Unfinished:
    """What killed runs of an environment left: backups that are not whole, and whole ones that wait to be sent."""

    begun: tuple[str, ...]
    waiting: tuple[str, ...]


@probe
def find_unfinished(store: Store, environment: str) -> Unfinished:
    """The names of what an environment's killed runs left in a store and its spool.

    Raises:
        Unreachable: the store does not answer.
    """
    names = sorted({*store.unfinished(environment), *DirectoryStore(store.spool).unfinished(environment)})
    waiting = [name for name in names if store.local(name) is None and (store.spool / name).is_dir()]
    return Unfinished(tuple(name for name in names if name not in waiting), tuple(waiting))


@action(idempotent=True)
def clean_unfinished(store: Store, environment: str, name: str) -> bool:
    """Remove one that is not whole; false where it turns out to be whole in the store: that stays. The environment's
    lock must be held: what it does not protect, another environment's in the same store, is not asked for here.

    Raises:
        OpsError, Unreachable: the store refuses or does not answer.
    """
    DirectoryStore(store.spool).clean(environment, name)
    return store.clean(environment, name)


@action(idempotent=True)
def send_waiting(store: Store, name: str) -> Backup:
    """Put one that is whole, and waits in the spool, into its store.

    Raises:
        OpsError, Unreachable: the store refuses or does not answer; it goes on waiting.
        VerificationFailed: likewise, or it was damaged while it waited (`set_aside`).
    """
    waiting = store.spool / name
    if waiting.is_dir():  # not: an attempt before this one sent it, and lost the answer
        store.offer(waiting, name, manifests.read(waiting).files)
    return open_backup(store, name)


@action(idempotent=True)
def set_aside(store: Store, environment: str, name: str) -> str:
    """Take a waiting one out of the others' way if it is damaged; returns how, "" where it is whole and stays."""
    waiting = store.spool / name
    try:
        problems = manifests.damage(waiting, manifests.read(waiting).files)
    except VerificationFailed as error:
        problems = [error.message]
    if problems:
        with told(waiting):
            waiting.rename(store.spool / f"{BAD}{name}")
        store.clean(environment, name)
    return problems[0] if problems else ""


@action(idempotent=True)
def sweep_spool(store: Store, kind: Kind | None = None, wanted: Collection[str] | None = None) -> None:
    """Remove from a spool what a killed run had sent, and what was on its way to a second store and is not `wanted`
    there any more (of one kind), or is not in its first store any more."""
    if not store.spool.is_dir() or not (left := [*store.spool.glob(f"{SENT}*"), *store.spool.glob(f"{TRANSIT}*")]):
        return
    kept = set(store.names() if wanted is None else wanted)
    for path in left:
        name = path.name.removeprefix(TRANSIT)
        of_kind = kind is None or name.startswith(f"{PREFIX[kind]}_")
        if path.name.startswith(SENT) or (of_kind and name not in kept):
            with told(path):
                shutil.rmtree(path)


def begin(store: Store, kind: Kind, environment: str, zone: ZoneInfo) -> tuple[str, Path]:
    """A name that is free, in the store as well, and the directory to write into, private to this user.

    Raises:
        OpsError: the spool or the store cannot be written to.
    """
    with told(store.spool):
        store.spool.mkdir(parents=True, exist_ok=True)

    def free_name() -> str:
        name = f"{PREFIX[kind]}_{clock.now().astimezone(zone):%Y%m%d_%H%M%S}"
        return name if not (store.spool / name).exists() and store.claim(environment, name) else ""

    name = until(free_name, what="a free name for the backup", seconds=15)
    directory = store.spool / f"{PARTIAL}{environment}-{name}"
    with told(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    return name, directory


@action
def publish(store: Store, directory: Path, manifest: Manifest) -> Backup:
    """Encrypt where the store's key says so, seal, and offer: everything is in the store before it has its name there.

    Raises:
        OpsError, Unreachable: the store cannot be written to. The backup waits in the spool; the next one takes it
            along.
    """
    if store.key.recipients:
        clear = manifest.files
        try:
            stored = encrypt_files(directory, clear, store.key)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)  # part of it is in clear
            raise
        manifest = manifest.model_copy(update={"files": stored, "clear": clear, "recipients": store.key.recipients})
    with told(directory):
        manifests.write(directory, manifest)
    failpoint("publish: sealed")
    store.offer(directory, manifest.name, manifest.files)
    return open_backup(store, manifest.name)
