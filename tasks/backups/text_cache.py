"""Small texts of stores that a run has read: a manifest is written once, and a run reads it more than once.

They are compressed, up to `MOST_BYTES`: a thousand backups of ten thousand tables have some gigabytes of manifests.
Texts on this host are read again: that is fast.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

from runbook.current import current_report
from runbook.report import Report
from tasks.backups import codec
from tasks.backups.heads import ManifestHeads
from tasks.stores.store import Store

MOST_BYTES = 256 << 20


class KnownTexts:
    """Of one run."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str, str], bytes] = {}
        self._bytes = 0
        self._heads: dict[tuple[str, Path], ManifestHeads] = {}
        self._lock = threading.Lock()

    def heads(self, store: Store) -> ManifestHeads:
        """The heads of a store's long manifests, loaded once a run."""
        with self._lock:
            return self._heads.setdefault((store.where, store.hands), ManifestHeads(store))

    def read(self, store: Store, path: str, stamp: str) -> str | None:
        """A text of a store, cached by its `stamp`. A missing text is queried again.

        Raises:
            Unreachable: the store does not answer.
        """
        if store.local(path) is not None:
            return store.read(path)
        name = (store.where, path, stamp)
        if packed := self._texts.get(name):
            return codec.decompress(packed).decode()
        text = store.read(path)
        if text is not None:
            packed = codec.compress(text.encode())
            with self._lock:
                if self._bytes + len(packed) <= MOST_BYTES:
                    self._texts[name] = packed
                    self._bytes += len(packed)
        return text


_last: tuple[weakref.ref[Report], KnownTexts] | None = None


def known_texts() -> KnownTexts:
    """The texts of the current run; outside a run, an empty cache."""
    global _last
    report = current_report()
    if report is None:
        return KnownTexts()
    if _last is None or _last[0]() is not report:
        _last = (weakref.ref(report), KnownTexts())
    return _last[1]
