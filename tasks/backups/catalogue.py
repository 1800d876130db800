"""The backups in a store: listed, opened, chosen, and marked as verified or failed.

A file in the store (`.verified/<name>.json`) records that a restore of a backup was verified: a backup itself never
changes. The files of a backup are read decrypted, on this host.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from runbook import clock
from runbook.errors import OpsError, VerificationFailed
from runbook.guard.process import this_process
from runbook.kinds import action, probe
from tasks.backups import manifest as manifests
from tasks.backups.heads import ManifestHeads
from tasks.backups.manifest import MANIFEST, SEAL, Head, Kind, Listed, Manifest
from tasks.backups.text_cache import KnownTexts, known_texts
from tasks.stores.store import RESOURCE, Store

PREFIX: dict[Kind, str] = {
    "postgres": "backup",
    "schema": "schema",
    "tables": "tables",
    "sql": "sql",
    "redis": "dump",
    "files": "app",
    "cluster": "base",
    "prefect": "prefect",
}
RESTORED_BY = {
    "postgres": "restore-database restores it",
    "redis": "restore-redis restores it",
    "cluster": "restore-to-point restores it",
    "prefect": "restore-prefect restores it",
    "files": "restore-files restores it",
}
VERIFIED = ".verified"
AT_HAND = ".at-hand-"
LATEST = "latest"
STAMP, PUT_BACK = "%Y%m%d_%H%M%S", timedelta(hours=2)
MOST_LETTERS = 1 << 16
"""A listing keeps only the head of a longer manifest."""
READERS = 16
KEPT = "{} (kept)"
"""The environment of the live data that a restore kept: `latest` never means such a backup."""


@dataclass(frozen=True)
class Backup:
    """A backup and its manifest. `path` is the directory of its decrypted files after `verify_files`.

    `verified` is the time of the last proven restore, empty if there was none. `failed` is the time of a later failed
    proof or reading, `reason` its cause. `broken` are the expectations that its data broke in the last restore.
    """

    path: Path
    manifest: Manifest
    store: Store
    verified: str = ""
    failed: str = ""
    broken: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self.manifest.name

    @property
    def is_proven(self) -> bool:
        """Whether a restore of it was equal by content, even if its data already broke a rule when it was taken."""
        return bool(self.verified or self.broken)

    @property
    def where(self) -> str:
        """Store and name, for people and permits."""
        return f"{self.store.where}/{self.name}"

    @property
    def age_seconds(self) -> float:
        """Since its snapshot."""
        return (clock.now() - self.manifest.taken).total_seconds()


def hand_of(store: Store, environment: str) -> Path:
    """The directory of this host into which this process fetches backups. Its name identifies the process, also
    among those that had the same number."""
    return store.hands / f"{AT_HAND}{environment}.{this_process().text}"


def names(store: Store, *kinds: Kind) -> list[str]:
    """Every offered backup of some kinds, oldest first."""
    pattern = re.compile(rf"(?:{'|'.join(PREFIX[kind] for kind in kinds)})_\d{{8}}_\d{{6}}")
    return sorted((name for name in store.names() if pattern.fullmatch(name)), key=lambda name: name.partition("_")[2])


def kind_of(name: str, otherwise: Kind) -> Kind:
    """The kind in a backup's name; `otherwise` for `latest` and dates."""
    return next(
        (kind for kind, prefix in PREFIX.items() if re.fullmatch(rf"{prefix}_\d{{8}}_\d{{6}}", name)), otherwise
    )


def open_backup(store: Store, name: str) -> Backup:
    """One backup by name, read anew.

    Raises:
        VerificationFailed: its manifest is missing or altered.
    """
    text, seal, note = (store.read(path) for path in (f"{name}/{MANIFEST}", f"{name}/{SEAL}", note_of(name)))
    return _opened(store, name, text, seal, note)


def open_all(store: Store, *kinds: Kind) -> tuple[list[Backup], list[str]]:
    """Every backup of some kinds, oldest first, and the names of those whose manifest cannot be read. A run reads each
    manifest once, and a long one is read once by all runs of this host. Notes are read again where they changed."""
    wanted = names(store, *kinds)
    heads = known_texts().heads(store)
    opened = _open(store, wanted, _stamps(store) if wanted else {}, heads)
    heads.save()
    return opened


def _open(
    store: Store, wanted: Sequence[str], notes: Mapping[str, str], heads: ManifestHeads | None = None
) -> tuple[list[Backup], list[str]]:
    """`heads`: only what a listing shows is needed of long manifests."""
    known, found, unreadable = known_texts(), list[Backup](), list[str]()

    def read(name: str) -> Backup | str | None:
        try:
            manifest, seal, _ = _read_listed(store, name, known, heads) if heads else _read_whole(store, name, known)
        except FileNotFoundError:
            return None
        except VerificationFailed:
            return name
        stamp = notes.get(f"{name}.json", "")
        return _backup(store, manifest, seal, known.read(store, note_of(name), stamp) if stamp else None)

    with ThreadPoolExecutor(READERS) as pool:
        for one in pool.map(read, wanted):
            if isinstance(one, Backup):
                found.append(one)
            elif one:
                unreadable.append(one)
    return found, unreadable


def _read_whole(store: Store, name: str, known: KnownTexts) -> tuple[Manifest, str, int]:
    """A manifest, its seal and the length of its text.

    Raises:
        FileNotFoundError: the bucket has neither: no backup was ever offered under that name.
        VerificationFailed: it is missing or altered.
    """
    seal, text = (known.read(store, f"{name}/{path}", name) for path in (SEAL, MANIFEST))
    if text is None and seal is None and store.local(name) is None:
        raise FileNotFoundError(name)
    return manifests.parse(name, text, seal), seal or "", len(text or "")


def _read_listed(store: Store, name: str, known: KnownTexts, heads: ManifestHeads) -> tuple[Manifest, str, int]:
    """As `_read_whole`. Of a long manifest only the head is kept: a listing of a thousand backups of ten thousand
    tables must fit in memory."""
    head = heads.find(name)
    if head is None:
        manifest, seal, letters = _read_whole(store, name, known)
        if letters <= MOST_LETTERS:
            return manifest, seal, letters
        head = Head.of(manifest, seal)
        heads.remember(head)
    seal = head.seal

    def read() -> Manifest:
        if store.read(f"{name}/{SEAL}") != seal:
            heads.forget(name)
            raise VerificationFailed(f"{name} is not the backup that was listed", "run it again")
        return open_backup(store, name).manifest

    return Listed.of(head, read), seal, 0


def _stamps(store: Store) -> dict[str, str]:
    """Notes that cannot be listed must not block a restore."""
    try:
        return store.stamps(VERIFIED)
    except OpsError:
        return {}


def _opened(store: Store, name: str, text: str | None, seal: str | None, note: str | None) -> Backup:
    return _backup(store, manifests.parse(name, text, seal), seal, note)


def _backup(store: Store, manifest: Manifest, seal: str | None, note: str | None) -> Backup:
    local = None if manifest.is_encrypted else store.local(manifest.name)
    path = local or hand_of(store, manifest.environment) / manifest.name / "clear"
    return Backup(path, manifest, store, *_noted(note, seal or ""))


def _noted(note: str | None, seal: str) -> tuple[str, ...]:
    """When a restore of this manifest was proven or failed, which rules its data broke, and why it failed. A note that
    cannot be read must not block a restore."""
    try:
        noted = json.loads(note or "")
        if noted.get("seal", seal) != seal:
            return ()
        return tuple(str(noted.get(key, "")) for key in ("verified", "failed", "rules", "reason"))
    except (OpsError, ValueError, TypeError, AttributeError):
        return ()


def note_of(name: str) -> str:
    """The file in a store that records the result of a backup's proof."""
    return f"{VERIFIED}/{name}.json"


@probe
def find_backup(
    store: Store, kind: Kind, wanted: str = LATEST, environment: str = "", *, failed_too: bool = False
) -> Backup:
    """The backup that an operator means: `latest`, a date `YYYYMMDD` (the newest of that day), or a name.

    Several environments may share a store: `latest` and a date choose among this environment's backups. A backup whose
    manifest cannot be read may be any environment's: if it is the newest, that is an error. One that failed its
    verification is chosen by its name, with `failed_too`, or where no other is left.

    Raises:
        OpsError: there is none, or it is a backup of something else; the newest ones are named.
        VerificationFailed: its manifest is missing or altered.
    """
    asked, kind = RESOURCE[kind], kind_of(wanted, kind)
    if RESOURCE[kind] != asked:
        raise OpsError(f"{wanted} is a backup of {RESOURCE[kind]}, not of {asked}", RESTORED_BY[RESOURCE[kind]])
    there = names(store, kind)
    if wanted in there:
        return open_backup(store, wanted)
    day = f"_{wanted}_" if re.fullmatch(r"\d{8}", wanted) else "_" if wanted == LATEST else "nothing"
    for accepting in (failed_too, True):
        if chosen := _newest(store, [name for name in there if day in name], environment, failed_too=accepting):
            return chosen
    known, _ = open_all(store, kind)
    own = sorted(
        (backup for backup in known if environment in ("", backup.manifest.environment)),
        key=lambda backup: backup.manifest.taken,
    )
    newest = ", ".join(backup.name for backup in reversed(own[-3:])) or "none at all"
    others = [backup for backup in known if backup not in own]
    more = f"; name another environment's backup in full, e.g. {others[-1].name}" if others else ""
    raise OpsError(
        f"there is no {kind} backup “{wanted[:80]}” in {store.where}", f"the newest in the store: {newest}{more}"
    )


def _newest(store: Store, wanted: Sequence[str], environment: str, *, failed_too: bool) -> Backup | None:
    """The newest of these of one's own: by its name, which tells a time of the environment's zone, and among those of
    some hours by the moment itself, since a clock may be put back. Older ones are not even read.

    Raises:
        VerificationFailed: the manifest of a newer one is missing or altered.
    """
    found, oldest, notes = list[Backup](), "", _stamps(store) if wanted else {}
    for name in reversed(wanted):
        if found and name.partition("_")[2] < oldest:
            break
        opened, unreadable = _open(store, [name], notes)
        if unreadable and not found:
            return open_backup(store, name)  # which says what is wrong with it
        for backup in opened:
            if environment in ("", backup.manifest.environment) and (failed_too or not backup.failed):
                found.append(backup)
                with contextlib.suppress(ValueError):  # a name that is no time: all are read
                    at = datetime.strptime(backup.name.partition("_")[2], STAMP) - PUT_BACK
                    oldest = oldest or at.strftime(STAMP)
    return max(found, key=lambda backup: backup.manifest.taken, default=None)


@probe
def find_nearest(store: Store, kind: Kind, moment: datetime, environment: str) -> Backup | None:
    """The backup of another kind, of the same environment, whose snapshot is nearest to a moment; None where there is
    none. One that cannot be read, or failed its verification, is passed over, where another is there.

    Raises:
        VerificationFailed: no manifest can be read: nobody knows whose they are.
    """
    known, unreadable = open_all(store, kind)
    found = [backup for backup in known if backup.manifest.environment == environment]
    if not found:
        return open_backup(store, unreadable[-1]) if unreadable else None  # which says what is wrong with it
    found = [backup for backup in found if not backup.failed] or found
    nearest = min(found, key=lambda backup: abs((backup.manifest.taken - moment).total_seconds()))
    nearest.manifest.whole()
    return nearest


def before(backup: Backup, most: int) -> list[Backup]:
    """The same environment's backups among the `most` before one in the store's list, oldest first."""
    manifest, store = backup.manifest, backup.store
    wanted = [name for name in names(store, manifest.kind) if name.partition("_")[2] < backup.name.partition("_")[2]]
    opened, _ = _open(store, wanted[-most:], _stamps(store))
    return [one for one in opened if one.manifest.environment == manifest.environment]


def earlier(backup: Backup, *, proven: bool = False) -> Backup | None:
    """The same environment's newest backup before one, without those that failed a proof; None where there is none.

    Args:
        proven: only those that a restore proved
    """
    return _last([one for one in _all_earlier(backup) if one.verified or not proven])


def earlier_proven_first(backup: Backup) -> Backup | None:
    """The newest earlier backup that a restore proved; without any, the newest. It lists the store once."""
    before = _all_earlier(backup)
    return _last([one for one in before if one.verified] or before)


def _last(backups: Sequence[Backup]) -> Backup | None:
    return max(backups, key=lambda one: one.manifest.taken, default=None)


def _all_earlier(backup: Backup) -> list[Backup]:
    manifest = backup.manifest
    return [
        other
        for other in open_all(backup.store, manifest.kind)[0]
        if other.manifest.environment == manifest.environment
        and other.manifest.taken < manifest.taken
        and not other.failed
    ]


def instead_of(backup: Backup) -> str:
    """The next step if a backup is damaged: an earlier one, and whether a restore proved it."""
    if proven := earlier(backup, proven=True):
        return (
            f"run it again with backup={proven.name}, which a restore proved ({proven.verified}); writes between the "
            "two are lost"
        )
    if other := earlier(backup):
        return f"no earlier backup was ever proven by a restore; run verify-backup for the previous one, {other.name}"
    return "there is no earlier backup: run it again with source=copies, or look for a copy in another store"


@action(idempotent=True)
def mark_verified(store: Store, name: str, facts: dict[str, str]) -> str:
    """Record that a restore of a backup was proven; returns the time. The note is valid for this manifest only.

    Raises:
        OpsError: the store cannot be written to.
    """
    return _note(store, name, "verified", facts)


@action(idempotent=True)
def mark_failed(store: Store, name: str, facts: dict[str, str]) -> str:
    """Record that a backup failed its proof: it no longer counts as verified; returns the time.

    Raises:
        OpsError: the store cannot be written to.
    """
    return _note(store, name, "failed", facts)


@action(idempotent=True)
def mark_broken(store: Store, name: str, facts: dict[str, str]) -> str:
    """Record that a backup restores and that its data breaks rules (`rules` of the facts): it counts neither as
    verified nor as failed; returns the time.

    Raises:
        OpsError: the store cannot be written to.
    """
    return _note(store, name, "broken", facts)


def _note(store: Store, name: str, how: str, facts: dict[str, str]) -> str:
    now = clock.now().isoformat(timespec="seconds")
    noted = {how: now, "seal": store.read(f"{name}/{SEAL}") or "", **facts}
    store.write(note_of(name), json.dumps(noted, ensure_ascii=False, indent=1))
    return now
