"""The backups in a store: found, chosen, published. A store is a directory with one directory per backup.

A backup is written under `.partial-<environment>-<name>` and published by rename, its manifest last: what has no such
prefix is whole. That a restore of it was verified is told by a file beside it (`.verified/<name>.json`): a backup
itself never changes.
"""

from __future__ import annotations

import contextlib
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
    return Backup(path, manifests.read(path), _verified(store, name))


def _verified(store: Path, name: str) -> str:
    """When a restore was proven; a file that cannot be read says nothing, and must not stand in a restore's way."""
    try:
        return str(json.loads((store / VERIFIED / f"{name}.json").read_text(encoding="utf-8"))["verified"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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
def find_nearest(store: Path, kind: Kind, moment: datetime, environment: str) -> Backup:
    """The backup of another kind, of the same environment, whose snapshot is nearest to a moment. One that cannot be
    read is passed over.

    Raises:
        OpsError: there is none.
    """
    found = []
    for name in names(store, kind):
        with contextlib.suppress(OpsError):
            found.append(open_backup(store, name))
    found = [backup for backup in found if backup.manifest.environment == environment]
    if not found:
        raise OpsError(
            f"there is no {kind} backup of {environment} in the store", f"take one, or restore without {kind}"
        )
    return min(found, key=lambda backup: abs((backup.manifest.taken - moment).total_seconds()))


@probe
def verify_files(backup: Backup) -> Sequence[str]:
    """Read every file of a backup and compare it with the manifest; returns what is wrong, as sentences."""
    return manifests.damage(backup.path, backup.manifest)


def earlier(store: Path, kind: Kind, name: str) -> str:
    """The backup before one: what to offer when that one is bad. Empty when there is none."""
    return next((other for other in reversed(names(store, kind)) if other < name), "")


@action(idempotent=True)
def clean_unfinished(store: Path, environment: str) -> list[str]:
    """Remove what an environment's killed backups left behind; returns their names. Its lock must be held: what it
    does not protect, another environment's in the same store, is left alone."""
    pattern = re.compile(rf"{re.escape(PARTIAL + environment)}-([a-z]+_\d{{8}}_\d{{6}})")
    found = [pattern.fullmatch(path.name) for path in sorted(store.iterdir())] if store.is_dir() else []
    left = [match for match in found if match]
    for match in left:
        shutil.rmtree(store / match[0])
    return [match[1] for match in left]


def begin(store: Path, kind: Kind, environment: str, zone: ZoneInfo) -> tuple[str, Path]:
    """A name that is free and the directory to write into, private to this user."""
    store.mkdir(parents=True, exist_ok=True)

    def free_name() -> str:
        name = f"{PREFIX[kind]}_{datetime.now(zone):%Y%m%d_%H%M%S}"
        return "" if (store / name).exists() else name

    name = until(free_name, what="a free name for the backup", seconds=5)
    directory = store / f"{PARTIAL}{environment}-{name}"
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
    """Write beside a backup that a restore of it was proven, now; returns when.

    Raises:
        OpsError: the store cannot be written to.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"verified": now, **facts}, ensure_ascii=False, indent=1)
    try:
        (store / VERIFIED).mkdir(exist_ok=True)
        beside = store / VERIFIED / f".{name}.new"
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        beside.replace(store / VERIFIED / f"{name}.json")
    except OSError as error:
        raise OpsError(
            f"that {name} is verified could not be noted: {error.strerror}", f"make {store} writable"
        ) from None
    return now


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
