"""The backups in a store: found, chosen, published. A store is a directory with one directory per backup.

A backup is written under `.partial-<name>` and published by rename, its manifest last: what has no such prefix is
whole. That a restore of it was verified is told by a file beside it (`.verified/<name>.json`): a backup itself never
changes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.wait import until
from tasks import manifest as manifests
from tasks.manifest import Kind, Manifest

PREFIX: dict[Kind, str] = {"postgres": "backup", "redis": "dump", "files": "app"}
PARTIAL = ".partial-"
VERIFIED = ".verified"
LATEST = "latest"


@dataclass(frozen=True)
class Backup:
    """A backup and its manifest. `verified` is when a restore of it was last proven, empty when never."""

    path: Path
    manifest: Manifest
    verified: str = ""

    @property
    def name(self) -> str:
        """As it stands in the store."""
        return self.path.name

    @property
    def age_seconds(self) -> float:
        """Since its snapshot."""
        return (datetime.now(UTC) - self.manifest.taken).total_seconds()


def names(store: Path, kind: Kind) -> list[str]:
    """Every published backup of a kind, oldest first."""
    pattern = re.compile(rf"{PREFIX[kind]}_\d{{8}}_\d{{6}}")
    if not store.is_dir():
        return []
    return sorted(path.name for path in store.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def open_backup(store: Path, name: str) -> Backup:
    """One backup by name.

    Raises:
        VerificationFailed: its manifest is missing or altered.
    """
    path = store / name
    seen = store / VERIFIED / f"{name}.json"
    verified = str(json.loads(seen.read_text())["verified"]) if seen.exists() else ""
    return Backup(path, manifests.read(path), verified)


@probe
def find_backup(store: Path, kind: Kind, wanted: str = LATEST) -> Backup:
    """The backup that an operator means: `latest`, a date `YYYYMMDD` (the newest of that day), or a name.

    Raises:
        OpsError: there is none, and which there are.
        VerificationFailed: its manifest is missing or altered, and which one is before it.
    """
    existing = names(store, kind)
    if wanted == LATEST:
        chosen = existing[-1:]
    elif re.fullmatch(r"\d{8}", wanted):
        chosen = [name for name in existing if name.split("_")[1] == wanted][-1:]
    else:
        chosen = [name for name in existing if name == wanted]
    if not chosen:
        newest = ", ".join(reversed(existing[-3:])) or "none at all"
        raise OpsError(f"there is no {kind} backup “{wanted[:80]}”", f"the newest in the store: {newest}")
    return open_backup(store, chosen[0])


@probe
def find_nearest(store: Path, kind: Kind, moment: datetime) -> Backup:
    """The backup of another kind whose snapshot is nearest to a moment. One that cannot be read is passed over.

    Raises:
        OpsError: there is none.
    """
    found = []
    for name in names(store, kind):
        try:
            found.append(open_backup(store, name))
        except OpsError:
            continue
    if not found:
        raise OpsError(f"there is no {kind} backup in the store", f"take one, or restore without {kind}")
    return min(found, key=lambda backup: abs((backup.manifest.taken - moment).total_seconds()))


@probe
def verify_files(backup: Backup) -> Sequence[str]:
    """Read every file of a backup and compare it with the manifest; returns what is wrong, as sentences."""
    return manifests.damage(backup.path, backup.manifest)


def earlier(store: Path, kind: Kind, name: str) -> str:
    """The backup before one: what to offer when that one is bad. Empty when there is none."""
    return next((other for other in reversed(names(store, kind)) if other < name), "")


@action(idempotent=True)
def clean_unfinished(store: Path) -> list[str]:
    """Remove what killed backups left behind; returns their names. The environment's lock must be held."""
    left = sorted(store.glob(f"{PARTIAL}*")) if store.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return [path.name.removeprefix(PARTIAL) for path in left]


def begin(store: Path, kind: Kind, zone: ZoneInfo) -> tuple[str, Path]:
    """A name that is free and the directory to write into, private to this user."""
    store.mkdir(parents=True, exist_ok=True)

    def free_name() -> str:
        name = f"{PREFIX[kind]}_{datetime.now(zone):%Y%m%d_%H%M%S}"
        return "" if (store / name).exists() else name

    name = until(free_name, what="a free name for the backup", seconds=5)
    directory = store / f"{PARTIAL}{name}"
    directory.mkdir(mode=0o700)
    return name, directory


def publish(directory: Path, manifest: Manifest) -> Path:
    """Seal a finished backup and give it its name: everything is on disk before it is offered."""
    manifests.write(directory, manifest)
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)
    final = directory.with_name(manifest.name)
    directory.rename(final)
    _sync(final.parent)
    return final


@action(idempotent=True)
def mark_verified(store: Path, name: str, facts: dict[str, str]) -> str:
    """Write beside a backup that a restore of it was proven, now; returns when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    (store / VERIFIED).mkdir(exist_ok=True)
    beside = store / VERIFIED / f".{name}.new"
    beside.write_text(json.dumps({"verified": now, **facts}, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.replace(store / VERIFIED / f"{name}.json")
    return now


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
