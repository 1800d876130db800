"""The backups in a store: found, chosen, offered, brought at hand.

That a restore of a backup was verified is told by a file beside it (`.verified/<name>.json`): a backup itself never
changes. What is read of a backup is read in clear and on this host: at hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.kinds import action, probe
from runbook.wait import until
from tasks import manifest as manifests
from tasks.encryption import encrypt_files
from tasks.manifest import MANIFEST, SEAL, Kind, Manifest
from tasks.stores.directory import PARTIAL, DirectoryStore
from tasks.stores.store import Store

PREFIX: dict[Kind, str] = {
    "postgres": "backup",
    "schema": "schema",
    "tables": "tables",
    "sql": "sql",
    "redis": "dump",
    "files": "app",
}
VERIFIED = ".verified"
AT_HAND = ".at-hand-"
LATEST = "latest"


@dataclass(frozen=True)
class Backup:
    """A backup and its manifest. `path` is where its files are, in clear, once it is at hand (`verify_files`).

    `verified` is when a restore of it was last proven, empty when never.
    """

    path: Path
    manifest: Manifest
    store: Store
    verified: str = ""

    @property
    def name(self) -> str:
        """As it stands in the store."""
        return self.manifest.name

    @property
    def where(self) -> str:
        """Store and name, for people and permits."""
        return f"{self.store.where}/{self.name}"

    @property
    def age_seconds(self) -> float:
        """Since its snapshot."""
        return (datetime.now(UTC) - self.manifest.taken).total_seconds()


def hand_of(store: Store, environment: str) -> Path:
    """The directory of this host into which this process brings backups."""
    return store.spool / f"{AT_HAND}{environment}-{os.getpid()}"


def names(store: Store, kind: Kind) -> list[str]:
    """Every offered backup of a kind, oldest first."""
    pattern = re.compile(rf"{PREFIX[kind]}_\d{{8}}_\d{{6}}")
    return sorted(name for name in store.names() if pattern.fullmatch(name))


def kind_of(name: str, otherwise: Kind) -> Kind:
    """The kind that a backup's name tells; `otherwise` for `latest` and dates."""
    return next(
        (kind for kind, prefix in PREFIX.items() if re.fullmatch(rf"{prefix}_\d{{8}}_\d{{6}}", name)), otherwise
    )


def open_backup(store: Store, name: str) -> Backup:
    """One backup by name.

    Raises:
        VerificationFailed: its manifest is missing or altered.
    """
    manifest = manifests.parse(name, store.read(f"{name}/{MANIFEST}"), store.read(f"{name}/{SEAL}"))
    local = None if manifest.clear else store.local(name)
    path = local or hand_of(store, manifest.environment) / name / "clear"
    return Backup(path, manifest, store, _verified(store, name))


def open_all(store: Store, kind: Kind) -> tuple[list[Backup], list[str]]:
    """Every backup of a kind, oldest first, and the names of those whose manifest cannot be read."""
    wanted = names(store, kind)

    def opened(name: str) -> Backup | None:
        with contextlib.suppress(VerificationFailed):
            return open_backup(store, name)
        return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(opened, wanted))
    return [backup for backup in found if backup], [
        name for name, backup in zip(wanted, found, strict=True) if backup is None
    ]


def _verified(store: Store, name: str) -> str:
    """When a restore was proven; a file that cannot be read says nothing, and must not stand in a restore's way."""
    try:
        return str(json.loads(store.read(f"{VERIFIED}/{name}.json") or "")["verified"])
    except (OpsError, ValueError, KeyError, TypeError):
        return ""


@probe
def find_backup(store: Store, kind: Kind, wanted: str = LATEST) -> Backup:
    """The backup that an operator means: `latest`, a date `YYYYMMDD` (the newest of that day), or a name.

    Raises:
        OpsError: there is none, and which there are.
        VerificationFailed: its manifest is missing or altered, and which one is before it.
    """
    existing = names(store, kind_of(wanted, kind))
    if wanted == LATEST:
        chosen = existing[-1:]
    elif re.fullmatch(r"\d{8}", wanted):
        chosen = [name for name in existing if name.split("_")[1] == wanted][-1:]
    else:
        chosen = [name for name in existing if name == wanted]
    if not chosen:
        newest = ", ".join(reversed(existing[-3:])) or "none at all"
        raise OpsError(
            f"there is no {kind} backup “{wanted[:80]}” in {store.where}", f"the newest in the store: {newest}"
        )
    return open_backup(store, chosen[0])


@probe
def find_nearest(store: Store, kind: Kind, moment: datetime, environment: str) -> Backup:
    """The backup of another kind, of the same environment, whose snapshot is nearest to a moment. One that cannot be
    read is passed over.

    Raises:
        OpsError: there is none.
    """
    found = [backup for backup in open_all(store, kind)[0] if backup.manifest.environment == environment]
    if not found:
        raise OpsError(
            f"there is no {kind} backup of {environment} in the store", f"take one, or restore without {kind}"
        )
    return min(found, key=lambda backup: abs((backup.manifest.taken - moment).total_seconds()))


def earlier(store: Store, kind: Kind, name: str) -> str:
    """The backup before one: what to offer when that one is bad. Empty when there is none."""
    return next((other for other in reversed(names(store, kind_of(name, kind))) if other < name), "")


@action(idempotent=True)
def clean_unfinished(store: Store, environment: str) -> list[str]:
    """Remove what an environment's killed backups left behind; returns their names. Its lock must be held: what it
    does not protect, another environment's in the same store, is left alone.

    One that is whole and only did not get to its store yet goes there now.
    """
    spool = DirectoryStore(store.spool)
    left = spool.unfinished(environment)
    for name in left:
        spool.clean(environment, name)
    for name in store.unfinished(environment):
        if spool.local(name) != store.local(name) and name in spool.names():
            waiting = manifests.read(store.spool / name)
            store.offer(store.spool / name, name, waiting.files)
        else:
            store.clean(environment, name)
            left.append(name)
    return left


def begin(store: Store, kind: Kind, environment: str, zone: ZoneInfo) -> tuple[str, Path]:
    """A name that is free and the directory to write into, private to this user."""
    store.spool.mkdir(parents=True, exist_ok=True)
    taken = set(store.names()) | {path.name for path in store.spool.iterdir()}

    def free_name() -> str:
        name = f"{PREFIX[kind]}_{datetime.now(zone):%Y%m%d_%H%M%S}"
        return "" if name in taken else name

    name = until(free_name, what="a free name for the backup", seconds=5)
    directory = store.spool / f"{PARTIAL}{environment}-{name}"
    directory.mkdir(mode=0o700)
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
        stored = encrypt_files(directory, clear, store.key)
        manifest = manifest.model_copy(update={"files": stored, "clear": clear, "recipients": store.key.recipients})
    manifests.write(directory, manifest)
    failpoint("publish: sealed")
    store.offer(directory, manifest.name, manifest.files)
    return open_backup(store, manifest.name)


@action(idempotent=True)
def mark_verified(store: Store, name: str, facts: dict[str, str]) -> str:
    """Write beside a backup that a restore of it was proven, now; returns when.

    Raises:
        OpsError: the store cannot be written to.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    store.write(f"{VERIFIED}/{name}.json", json.dumps({"verified": now, **facts}, ensure_ascii=False, indent=1))
    return now
