"""Which backups may go, by the safe rule: only what verified newer ones stand in for (§1.2, manual-traps)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks import catalogue
from tasks.catalogue import KEPT, Backup, note_of
from tasks.cluster.content import needed_by
from tasks.manifest import Kind
from tasks.stores.store import Store

DELETE = "delete backup"
KEPT_DAYS, KEPT_VERIFIED, THIN_AFTER_HOURS = 30, 3, 48
"""prune-backups' own; the days are the manual's (§1.2)."""
THINNED: tuple[Kind, ...] = ("postgres", "redis", "files")
"""What take-due-backups takes many of a day. Others are taken on purpose; a base backup carries the WAL after it."""


@dataclass(frozen=True)
class Rule:
    """How long backups stay: all of them for `thin_after`, then one of each day of `zone` (an aware moment's own day:
    23 or 25 hours where clocks change), until they are older than `age`. The newest `keep_verified` stay anyway."""

    age: timedelta
    keep_verified: int
    thin_after: timedelta
    zone: ZoneInfo


@dataclass(frozen=True)
class Stored:
    """An environment's backups of some kinds, oldest first, and the names of those whose manifest cannot be read.
    `kept` is what restores kept of the live data before them: it stands in for no backup."""

    backups: tuple[Backup, ...]
    unreadable: tuple[str, ...]
    kept: tuple[Backup, ...] = ()

    def doomed(self, rule: Rule) -> tuple[Backup, ...]:
        """What the rule lets go, and is neither among the newest verified ones nor newer than the newest of those.

        While there are not that many verified ones nothing may go: an older backup may be the only one that restores.
        """
        verified = [backup for backup in self.backups if backup.verified]
        if len(verified) < rule.keep_verified:
            return ()
        staying = {backup.name for backup in verified[-rule.keep_verified :]}
        newest, now = verified[-1].manifest.taken, datetime.now(UTC)
        surplus = {backup.name for backup in self._surplus(now - rule.thin_after, rule.zone)}
        doomed = [
            backup
            for backup in (*self.backups, *self.kept)
            if (backup.manifest.taken < now - rule.age or backup.name in surplus)
            and backup.manifest.taken < newest
            and backup.name not in staying
        ]
        return tuple(self._without_needed(doomed))

    def _surplus(self, before: datetime, zone: ZoneInfo) -> Iterator[Backup]:
        """Taken before a moment, and not the one of its day that stays: the last, of those that are verified best."""
        days = defaultdict[date, list[Backup]](list)
        for backup in self.backups:
            if backup.manifest.kind in THINNED:
                days[backup.manifest.taken.astimezone(zone).date()].append(backup)
        for of_day in days.values():
            stays = max(of_day, key=lambda one: (bool(one.verified), not one.failed, one.manifest.taken))
            yield from (one for one in of_day if one.name != stays.name and one.manifest.taken < before)

    def _without_needed(self, doomed: Sequence[Backup]) -> list[Backup]:
        """Base backups go by chain: never one on which another stands that stays. Those that stand on others go first,
        so that a run that is killed leaves none without what it stands on."""
        if not doomed or doomed[0].manifest.kind != "cluster":
            return list(doomed)
        names = {backup.name for backup in doomed}
        needed = needed_by([backup for backup in self.backups if backup.name not in names], self.backups)
        return [backup for backup in reversed(doomed) if backup.name not in needed]

    def from_the_future(self) -> tuple[str, ...]:
        """Backups that were taken later than now: the clock jumped, and ages mean nothing."""
        return tuple(backup.name for backup in self.backups if backup.age_seconds < 0)


@probe
def read_stores(
    places: Sequence[tuple[Store | OpsError, Sequence[Kind]]], environment: str
) -> tuple[Stored | OpsError, ...]:
    """Every offered backup of an environment in each of several stores, all asked at once; the error of one that cannot
    be listed, or was none to begin with."""

    def read(place: tuple[Store | OpsError, Sequence[Kind]]) -> Stored | OpsError:
        store, kinds = place
        if isinstance(store, OpsError):
            return store
        try:
            return _read(store, kinds, environment)
        except OpsError as error:
            return error

    with ThreadPoolExecutor(max(len(places), 1)) as pool:
        return tuple(pool.map(read, places))


@probe
def read_store(store: Store, kind: Kind, environment: str) -> Stored:
    """Every offered backup of an environment, and what its restores kept."""
    return _read(store, (kind,), environment)


def _read(store: Store, kinds: Sequence[Kind], environment: str) -> Stored:
    backups, unreadable = catalogue.open_all(store, *kinds)
    backups.sort(key=lambda backup: backup.manifest.taken)
    own, kept = (
        tuple(backup for backup in backups if backup.manifest.environment == name)
        for name in (environment, KEPT.format(environment))
    )
    return Stored(own, tuple(unreadable), kept)


@probe
def read_backup(backup: Backup) -> tuple[str, ...]:
    """Read a backup's files where they are, and compare them with the manifest; returns what is wrong."""
    return tuple(backup.store.damage(backup.name, backup.manifest.files))


@action(idempotent=True)
def delete_backups(permit: Permit, environment: str, doomed: Sequence[Backup]) -> int:
    """Remove backups; returns their bytes. Each loses its name first, so that a run that is killed leaves none that is
    half there: the next backup removes the rest.

    Raises:
        OpsError: the store refuses (an object lock).
    """
    freed = 0
    for backup in doomed:
        permit.require(DELETE, backup.where)
        backup.store.remove(environment, backup.name)
        backup.store.forget(note_of(backup.name))
        freed += backup.manifest.bytes
    return freed
