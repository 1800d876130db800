"""A cache on disk of what listings show of long manifests: parsing one of 10,000 tables takes a tenth of a second.

A manifest is written once, so its head stays true while the file is the same one. The cache only saves reading: a
restore, a proof and a deletion read the manifest itself and compare it with the head (`Listed.whole`). A cache that is
damaged, foreign, too large or of another format is ignored and written again.

Comparing takes two requests to a bucket, so a thousand backups take seconds. A listing compares those of the last two
days. Each older one is compared every one to two hours.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import time
import zlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from runbook.files import durable
from tasks.backups.manifest import MANIFEST, SEAL, Head
from tasks.stores.store import Store

FILE = ".heads.json"
MOST_BYTES = 64 << 20
SAVE_EVERY = 100
"""A first listing of a large store takes minutes: one that is killed must not have read for nothing."""


TRUSTED_SECONDS, RECENT_SECONDS = 3600, 2 * 86400


class _Known(BaseModel):
    """`checked`: when the head was compared with the store, in seconds of the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    identity: str
    head: Head
    checked: float

    @property
    def is_trusted(self) -> bool:
        """Whether it is old and was compared lately. The times differ by name, so a listing compares only a few."""
        if time.time() - self.head.taken.timestamp() < RECENT_SECONDS:
            return False
        trusted = TRUSTED_SECONDS * (1 + zlib.crc32(self.head.name.encode()) / 0xFFFFFFFF)
        return 0 <= time.time() - self.checked < trusted


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[2]
    store: str
    heads: dict[str, _Known]


class ManifestHeads:
    """The heads of one store's long manifests. Several workers may share the file: the last one that saves adds to
    what the others saved, and a head that is lost is read again."""

    def __init__(self, store: Store) -> None:
        self._store, self._path = store, store.hands / FILE
        self._known = self._load()
        self._checked, self._unsaved = set[str](), 0
        self._lock = threading.Lock()

    def find(self, name: str) -> Head | None:
        """The head of a backup whose manifest and seal are unchanged since it was read; None: read the manifest.

        A bucket is queried once a run, and only for heads that were not compared lately.

        Raises:
            Unreachable: the store does not answer.
        """
        known, store = self._known.get(name), self._store
        if known is None or known.head.name != name:
            return None
        if (name in self._checked or known.is_trusted) and store.local(name) is None:
            return known.head
        same = store.identity(f"{name}/{MANIFEST}") == known.identity
        if not same or store.read(f"{name}/{SEAL}") != known.head.seal:
            return None
        with self._lock:
            self._checked.add(name)
            if store.local(name) is None:
                self._known[name] = known.model_copy(update={"checked": time.time()})
                self._unsaved += 1
        return known.head

    def forget(self, name: str) -> None:
        """The backup was replaced: the next listing reads it again."""
        with self._lock:
            self._known.pop(name, None)
            self._checked.discard(name)
            known = self._load()
            if known.pop(name, None):
                self._save(known)

    def remember(self, head: Head) -> None:
        """Keep the head of a manifest that was just read, unless the backup was replaced meanwhile.

        Raises:
            Unreachable: the store does not answer.
        """
        identity = self._store.identity(f"{head.name}/{MANIFEST}")
        if not identity or self._store.read(f"{head.name}/{SEAL}") != head.seal:
            return
        with self._lock:
            self._known[head.name] = _Known(identity=identity, head=head, checked=time.time())
            self._checked.add(head.name)
            self._unsaved += 1
            if self._unsaved >= SAVE_EVERY:
                self._save(self._load() | self._known)

    def save(self) -> None:
        """Write what is new, without backups that are no longer offered."""
        with self._lock:
            if self._unsaved:
                known, offered = self._load() | self._known, set(self._store.names())
                self._save({name: known[name] for name in known if name in offered})

    def _load(self) -> dict[str, _Known]:
        try:
            opened = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(opened, "rb") as file:
                found = os.fstat(opened)
                private = stat.S_ISREG(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
                if not private or found.st_uid != os.geteuid() or found.st_size > MOST_BYTES:
                    return {}
                digest, _, text = file.read(MOST_BYTES).partition(b"\n")
            if hashlib.sha256(text).hexdigest().encode() != digest:
                return {}
            content = _File.model_validate_json(text)
        except (OSError, ValidationError):
            return {}
        return dict(content.heads) if content.store == self._store.where else {}

    def _save(self, known: dict[str, _Known]) -> None:
        """What cannot be written is read again by the next run."""
        self._unsaved = 0
        content = _File(format=2, store=self._store.where, heads=_newest(known)).model_dump_json()
        text = f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}"
        with contextlib.suppress(OSError):
            _write(self._path, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    durable.write(path, text, mode=0o600, owner=(os.geteuid(), os.getegid()))


def _newest(known: dict[str, _Known]) -> dict[str, _Known]:
    """As many as the file may hold: an old backup is listed as often as a new one, and expires sooner."""
    kept, free = dict[str, _Known](), MOST_BYTES // 2
    for name in sorted(known, key=lambda name: known[name].head.taken, reverse=True):
        free -= len(known[name].model_dump_json())
        if free < 0:
            break
        kept[name] = known[name]
    return kept
