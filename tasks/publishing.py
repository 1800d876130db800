"""Backups on their way into a store: begun under a name that is free, sealed, offered; what killed runs left."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.wait import until
from tasks import manifest as manifests
from tasks.catalogue import PREFIX, Backup, open_backup
from tasks.encryption import encrypt_files
from tasks.manifest import Kind, Manifest
from tasks.stores.directory import BAD, PARTIAL, SENT, DirectoryStore
from tasks.stores.store import Store


@dataclass(frozen=True)
class Tidied:
    """What became of what killed runs left: removed, sent to its store at last, or set aside since it is damaged (with
    the reason)."""

    removed: tuple[str, ...] = ()
    sent: tuple[Backup, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()


@action(idempotent=True)
def clean_unfinished(store: Store, environment: str) -> Tidied:
    """Remove what an environment's killed backups left behind. Its lock must be held: what it does not protect, another
    environment's in the same store, is left alone.

    One that is whole and only did not get to its store goes there now. One that is damaged is set aside: it must not
    keep others from being taken.

    Raises:
        Unreachable: the store does not answer.
    """
    spool = DirectoryStore(store.spool)
    removed = spool.unfinished(environment)
    for name in removed:
        spool.clean(environment, name)
    for path in store.spool.glob(f"{SENT}*"):
        shutil.rmtree(path)
    sent, bad = [], []
    for name in store.unfinished(environment):
        waiting = store.spool / name
        if waiting == store.local(name) or not waiting.is_dir():
            if store.clean(environment, name):
                removed.append(name)
            continue
        try:
            store.offer(waiting, name, manifests.read(waiting).files)
            sent.append(open_backup(store, name))
        except Unreachable:
            raise
        except OpsError as error:
            waiting.rename(store.spool / f"{BAD}{name}")
            store.clean(environment, name)
            bad.append((name, error.message))
    return Tidied(tuple(removed), tuple(sent), tuple(bad))


def begin(store: Store, kind: Kind, environment: str, zone: ZoneInfo) -> tuple[str, Path]:
    """A name that is free, in the store as well, and the directory to write into, private to this user."""
    store.spool.mkdir(parents=True, exist_ok=True)

    def free_name() -> str:
        name = f"{PREFIX[kind]}_{datetime.now(zone):%Y%m%d_%H%M%S}"
        return name if not (store.spool / name).exists() and store.claim(environment, name) else ""

    name = until(free_name, what="a free name for the backup", seconds=15)
    directory = store.spool / f"{PARTIAL}{environment}-{name}"
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
    manifests.write(directory, manifest)
    failpoint("publish: sealed")
    store.offer(directory, manifest.name, manifest.files)
    return open_backup(store, manifest.name)
