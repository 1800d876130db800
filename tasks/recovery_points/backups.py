"""Recovery points of backups, by their manifests and the proof of a restore (§8.1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from blocks.environment import Environment, Stores
from runbook import clock
from runbook.errors import OpsError
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind
from tasks.backups.retention import StoredBackup
from tasks.host.disk import is_here
from tasks.recovery_points.point import Point, Resource
from tasks.stores.store import Store, store_of

PATIENCE_SECONDS = 5.0
KINDS: dict[Resource, Kind] = {"database": "postgres", "redis": "redis", "files": "files"}
TAKEN_BY: dict[Resource, str] = {"database": "backup-database", "redis": "backup-redis", "files": "backup-files"}
DAILY_SECONDS = 86400.0
"""The manual's interval (§1.2, §2.3, §8.2)."""
LOOKED_AT = timedelta(days=7)


def place_for(env: Environment, resource: Resource, which: Stores) -> tuple[Store | OpsError, Sequence[Kind]]:
    """The argument of tasks.backups.retention.read_stores: the store, or why there is none."""
    kind = KINDS[resource]
    try:
        store = store_of(env, kind, which, patience_seconds=PATIENCE_SECONDS)
    except OpsError as error:
        return error, (kind,)
    if not store.where.startswith("s3://") and not Path(store.where).is_dir():
        hint = f"mount it, or correct [{which}]; the first {TAKEN_BY[resource]} creates it"
        return OpsError(f"{store.where} is missing", hint), (kind,)
    return store, (kind,)


def is_beside(env: Environment, resource: Resource, which: Stores, kinds: Sequence[Kind | Literal["wal"]]) -> bool:
    """Whether one of these stores is a directory on the resource's host: it is lost with the host, unless the
    environment declares that it survives."""
    stores = env.stores(which)
    if stores.survives == "server" or not lives_here(env, resource):
        return False
    return any(not str(getattr(stores, kind)).startswith("s3://") for kind in kinds)


def lives_here(env: Environment, resource: Resource) -> bool:
    """Whether a resource is on this host; the application's files always are."""
    match resource:
        case "database":
            return is_here(env.postgres.host)
        case "redis":
            return is_here(env.redis.host)
    return True


def backup_points(
    resource: Resource, which: Stores, stored: StoredBackup | OpsError, all_kept: timedelta = LOOKED_AT
) -> list[Point]:
    """The newest proven backup, and the newest unproven one if that is newer; for an unreadable store an unknown point.
    `all_kept`: the time for which prune-backups keeps all backups."""
    if isinstance(stored, OpsError):
        return [Point(resource, "backup", which, problem=stored.message, hint=stored.hint, unknown=True)]
    now = clock.now()
    whole = [one for one in stored.backups if not one.failed and one.manifest.taken <= now]
    if not whole:
        hint = f"run {TAKEN_BY[resource]}" if which == "backups" else "run replicate-backups"
        why = "every backup failed a verification" if stored.backups else "there is none"
        return [Point(resource, "backup", which, problem=why, hint=hint)]
    proven = [one for one in whole if one.verified]
    wanted = [*proven[-1:], *([] if proven and proven[-1] is whole[-1] else whole[-1:])]
    every = longest_gap([one.manifest.taken for one in stored.backups], now, all_kept)
    return [_point(resource, which, one, every) for one in wanted]


def _point(resource: Resource, which: Stores, backup: Backup, every: float) -> Point:
    manifest = backup.manifest
    return Point(
        resource,
        "backup",
        which,
        backup.name,
        manifest.taken,
        proven=backup.verified,
        bytes=manifest.bytes,
        restored_bytes=_restored(backup),
        every_seconds=every,
        detail=f"in {backup.store.where}",
    )


def _restored(backup: Backup) -> int:
    """The bytes that it needs on disk, from its manifest."""
    content = backup.manifest.content
    if isinstance(told := content.get("bytes"), int):
        return told
    entries = content.get("entries")
    if isinstance(entries, list):
        return sum(int(entry.get("size", 0)) for entry in entries)
    return backup.manifest.bytes


def longest_gap(taken: Sequence[datetime], now: datetime, all_kept: timedelta = LOOKED_AT) -> float:
    """The longest time in seconds between two backups of the last week, or of the time for which all are kept: earlier
    gaps come from prune-backups. With fewer than two backups: the manual's day."""
    since = now - min(LOOKED_AT, all_kept)
    lately = [one for one in sorted(taken) if one >= since]
    earlier = [one if all_kept >= LOOKED_AT else since for one in sorted(taken) if one < since][-1:]
    times = [*earlier, *lately]
    gaps = [(two - one).total_seconds() for one, two in itertools.pairwise(times)]
    return max(gaps, default=DAILY_SECONDS)


def bad_newest(stored: StoredBackup) -> Backup | None:
    """The newest backup, if it failed its verification: the next one may have the same fault."""
    newest = max(stored.backups, key=lambda one: one.manifest.taken, default=None)
    return newest if newest and newest.failed else None
