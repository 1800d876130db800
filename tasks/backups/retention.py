"""Which backups are kept, by tiers of age and by their proof (§1.2), and which can be deleted."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean
from typing import get_args
from zoneinfo import ZoneInfo

from blocks.environment import Environment, Stores
from blocks.places import Keep
from runbook import clock, metrics
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.backups import catalogue
from tasks.backups.catalogue import KEPT, Backup, note_of
from tasks.backups.manifest import MANIFEST, Kind
from tasks.backups.shrinkage import kept_for_drops
from tasks.cluster.content import needed_by
from tasks.stores.store import Store, has_place, store_of

DELETE = "delete backup"
ON_PURPOSE: tuple[Kind, ...] = ("schema", "tables", "sql")
"""Taken by hand, each with its own content: none of them represents another one of its day."""
AS_TOML = -1


@dataclass(frozen=True)
class RetentionRule:
    """What `keep` says, with days, weeks and months of `zone` (a day of 23 or 25 hours where clocks change)."""

    keep: Keep
    zone: ZoneInfo
    shrunk_ratio: float = metrics.BACKUP_SHRUNK.warn

    @property
    def window(self) -> timedelta:
        """How far back the daily tier goes: single backups stay so long, and so far back the cluster can be brought to
        any moment."""
        return max(timedelta(hours=self.keep.hours), timedelta(days=self.keep.daily))


def rule_of(env: Environment, which: Stores = "backups", **given: int) -> RetentionRule:
    """The rule of a set of stores, from the TOML. `given` replaces single keys of `keep`, but for `AS_TOML`."""
    keep = env.stores(which).keep
    keep = Keep(**(keep.model_dump() | {key: n for key, n in given.items() if n != AS_TOML}))
    return RetentionRule(keep, env.zone, env.limits[metrics.BACKUP_SHRUNK.name][0])


def reasons_to_stay(backups: Sequence[Backup], rule: RetentionRule, now: datetime) -> dict[str, str]:
    """Why each backup of one kind stays, by name. What is not in the result can be deleted.

    Everything stays while fewer than `keep.verified` backups are proven, or one is of the future (the clock jumped).
    Nothing newer than the newest proven backup goes: nobody knows whether it restores. The newest verified ones stay
    beside them: data that breaks its rules must not push out the last that kept them. So does the last one before
    tables shrank: emptied data restores and verifies too. Ages are counted from the
    newest backup, so that a clock that jumped ahead, or backups that stopped, make none old.
    """
    ordered = sorted(backups, key=lambda one: one.manifest.taken)
    proven, verified = [one for one in ordered if one.is_proven], [one for one in ordered if one.verified]
    if len(proven) < rule.keep.verified or ordered[-1].manifest.taken > now:
        return {
            one.name: "too few are verified" if ordered[-1].manifest.taken <= now else "the clock jumped"
            for one in ordered
        }
    newest = [*proven[-rule.keep.verified :], *verified[-rule.keep.verified :]]
    stays = {one.name: f"one of the {rule.keep.verified} newest verified" for one in newest}
    for one in ordered:
        if one.manifest.taken > proven[-1].manifest.taken:
            stays.setdefault(one.name, "newer than the newest verified")
    for name, why in _of_tiers(ordered, rule):
        stays.setdefault(name, why)
    for drop in kept_for_drops(ordered, rule.keep, rule.shrunk_ratio):
        stays.setdefault(drop.backup.name, "the last before tables shrank")
    if ordered[0].manifest.kind == "cluster":
        for name in needed_by([one for one in ordered if one.name in stays], ordered):
            stays.setdefault(name, "a later one is incremental to it")
    return stays


def _of_tiers(ordered: Sequence[Backup], rule: RetentionRule) -> Iterator[tuple[str, str]]:
    """What the tiers keep, oldest first in `ordered`; the first reason counts."""
    keep, newest = rule.keep, ordered[-1].manifest
    single = newest.kind in ON_PURPOSE
    youngest = rule.window if single else timedelta(hours=keep.hours)
    for one in ordered:
        if newest.taken - one.manifest.taken < youngest:
            yield one.name, f"younger than {youngest.days} days" if single else f"younger than {keep.hours} hours"
    tiers: tuple[tuple[str, int, Callable[[datetime], Hashable]], ...] = (
        ("day", keep.daily, lambda taken: taken.date()),
        ("week", keep.weekly, lambda taken: taken.isocalendar()[:2]),
        ("month", keep.monthly, lambda taken: (taken.year, taken.month)),
    )
    for period, number, period_of in () if single else tiers:
        chosen = dict[Hashable, Backup]()
        for one in sorted(ordered, key=_by_proof):
            chosen[period_of(one.manifest.taken.astimezone(rule.zone))] = one
        last = sorted(chosen.values(), key=lambda one: one.manifest.taken)[-number:] if number else []
        yield from ((one.name, f"of its {period}") for one in last)


def _by_proof(backup: Backup) -> tuple[bool, bool, bool, datetime]:
    """Of one period the last of this order stays: a verified one, else a proven one, else one that did not fail."""
    return bool(backup.verified), backup.is_proven, not backup.failed, backup.manifest.taken


@dataclass(frozen=True)
class StoredBackup:
    """An environment's backups of some kinds, oldest first, and the names of those whose manifest cannot be read.
    `kept` is what restores kept of the live data before them: it stands in for no backup."""

    backups: tuple[Backup, ...]
    unreadable: tuple[str, ...]
    kept: tuple[Backup, ...] = ()

    def doomed(self, rule: RetentionRule) -> tuple[Backup, ...]:
        """What the rule lets go, oldest first; of base backups those that are incremental to others first, so that a
        run that is killed leaves none without its base. Kept live data goes when it is older than the daily tier, and
        only with a newer verified backup."""
        now = clock.now()
        stays = reasons_to_stay(self.backups, rule, now) if self.backups else {}
        proven = [one for one in self.backups if one.is_proven]
        doomed = [one for one in self.backups if one.name not in stays]
        if len(proven) >= rule.keep.verified and not self.from_the_future():
            before = min(now - rule.window, proven[-1].manifest.taken)
            doomed += [one for one in self.kept if one.manifest.taken < before]
        return tuple(reversed(doomed)) if doomed and doomed[0].manifest.kind == "cluster" else tuple(doomed)

    def from_the_future(self) -> tuple[str, ...]:
        """Backups that were taken later than now: the clock jumped, and ages mean nothing."""
        return tuple(backup.name for backup in self.backups if backup.age_seconds < 0)


def most_unattended(number: int, share: float) -> int:
    """The most that one unattended run deletes. The next run continues."""
    return max(1, int(number * share))


@probe
def read_stores(
    places: Sequence[tuple[Store | OpsError, Sequence[Kind]]], environment: str
) -> tuple[StoredBackup | OpsError, ...]:
    """Every offered backup of an environment in each of several stores, all asked at once; the error of one that cannot
    be listed, or was none to begin with."""

    def read(place: tuple[Store | OpsError, Sequence[Kind]]) -> StoredBackup | OpsError:
        store, kinds = place
        if isinstance(store, OpsError):
            return store
        try:
            return _read(store, kinds, environment)
        except OpsError as error:
            return error

    contexts = [contextvars.copy_context() for _ in places]  # a thread does not know of the run: what it has read
    with ThreadPoolExecutor(max(len(places), 1)) as pool:
        return tuple(pool.map(lambda context, place: context.run(read, place), contexts, places))


@probe
def read_store(store: Store, kind: Kind, environment: str) -> StoredBackup:
    """Every offered backup of an environment, and what its restores kept."""
    return _read(store, (kind,), environment)


def _read(store: Store, kinds: Sequence[Kind], environment: str) -> StoredBackup:
    backups, unreadable = catalogue.open_all(store, *kinds)
    backups.sort(key=lambda backup: backup.manifest.taken)
    own, kept = (
        tuple(backup for backup in backups if backup.manifest.environment == name)
        for name in (environment, KEPT.format(environment))
    )
    return StoredBackup(own, tuple(unreadable), kept)


@probe
def read_backup(backup: Backup) -> tuple[str, ...]:
    """Read a backup's files where they are, and compare them with the manifest; returns what is wrong."""
    return tuple(backup.store.damage(backup.name, backup.manifest.files))


@action(of=lambda doomed: [Act(DELETE, backup.where) for backup in doomed], idempotent=True)
def delete_backups(environment: str, doomed: Sequence[Backup]) -> int:
    """Remove backups; returns their bytes. Each loses its name first, so that a run that is killed leaves none that is
    half there: the next backup removes the rest.

    Raises:
        OpsError: the store refuses (an object lock).
        VerificationFailed: a backup is not the one that was listed.
    """
    freed = 0
    for backup in doomed:
        _require_as_listed(backup)
        backup.store.remove(environment, backup.name)
        backup.store.forget(note_of(backup.name))
        freed += backup.manifest.bytes
    return freed


def _require_as_listed(backup: Backup) -> None:
    """The rule was applied to what a listing showed, which may come from a cache.

    Raises:
        VerificationFailed: the backup's own manifest differs.
    """
    if backup.store.read(f"{backup.name}/{MANIFEST}") is not None:  # None: an attempt before this one removed it
        backup.manifest.whole()


PATIENCE_SECONDS = 5.0
PROVEN_EVERY_DAYS: dict[Kind, int] = {"postgres": 1, "redis": 1, "files": 1, "cluster": 7, "prefect": 7}
"""How often verify-backup runs (prefect.yaml): until then nothing newer than the last proof is deleted."""


@dataclass(frozen=True)
class Need:
    """What one kind of backup takes in one set of stores: `number` backups of about `each_bytes` once every tier is
    full, and what is there now. `number` 0: there is no backup to reckon with."""

    which: Stores
    kind: Kind
    number: int
    each_bytes: float
    there_bytes: int

    @property
    def bytes(self) -> int:
        """In the long run."""
        return int(self.number * self.each_bytes)


def expected_backups(keep: Keep, a_day: float, proven_every_days: float = 1) -> int:
    """How many backups there are at most once every tier is full, of so many a day, with a proof every so many days."""
    whole = max(keep.hours / 24, proven_every_days) + 1  # prune-backups runs once a day
    daily = max(0.0, keep.daily - keep.hours / 24)
    weekly = max(0, keep.weekly - keep.daily // 7)
    monthly = max(0, keep.monthly - max(keep.daily, 7 * keep.weekly) // 31)
    return math.ceil(whole * a_day + daily + weekly + monthly) + keep.verified


def retention_bytes(keep: Keep, each_bytes: float, a_day: float, proven_every_days: float = 1) -> int:
    """The bytes that so many backups of that size use."""
    return int(expected_backups(keep, a_day, proven_every_days) * each_bytes)


def need_of(which: Stores, kind: Kind, backups: Sequence[Backup], keep: Keep) -> Need:
    """From the existing backups: their average size, and the number of the last day."""
    if not backups:
        return Need(which, kind, 0, 0.0, 0)
    newest = max(one.manifest.taken for one in backups)
    a_day = sum(1 for one in backups if newest - one.manifest.taken < timedelta(days=1))
    sizes = [one.manifest.bytes for one in backups]
    number = expected_backups(keep, a_day, PROVEN_EVERY_DAYS.get(kind, 7))
    return Need(which, kind, number, fmean(sizes), sum(sizes))


def read_needs(env: Environment) -> tuple[tuple[Need, ...], tuple[str, ...]]:
    """The space that each set of stores will need for each kind of backup, and why some could not be read."""
    needs, problems = list[Need](), list[str]()
    for which in get_args(Stores):
        for kind in PROVEN_EVERY_DAYS:
            if not has_place(env, kind, which):
                continue
            try:
                store = store_of(env, kind, which, patience_seconds=PATIENCE_SECONDS)
            except OpsError as error:
                problems.append(error.message)
                continue
            (found,) = read_stores([(store, (kind,))], env.name)
            if isinstance(found, StoredBackup):
                needs.append(need_of(which, kind, found.backups, rule_of(env, which).keep))
            else:
                problems.append(found.message)
    return tuple(needs), tuple(problems)
