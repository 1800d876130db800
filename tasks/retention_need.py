"""The disk space that the configured retention will need: so many backups of the size that they have now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import get_args

from blocks.environment import Environment, Stores
from blocks.places import Keep
from runbook.errors import OpsError
from tasks.catalogue import Backup
from tasks.manifest import Kind
from tasks.retention import Stored, read_stores, rule_of
from tasks.stores.store import has_place, store_of

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
    """The bytes that so many backups of that size take."""
    return int(expected_backups(keep, a_day, proven_every_days) * each_bytes)


def need_of(which: Stores, kind: Kind, backups: Sequence[Backup], keep: Keep) -> Need:
    """From the backups that are there: their average size, and how many the last day had."""
    if not backups:
        return Need(which, kind, 0, 0.0, 0)
    newest = max(one.manifest.taken for one in backups)
    a_day = sum(1 for one in backups if newest - one.manifest.taken < timedelta(days=1))
    sizes = [one.manifest.bytes for one in backups]
    number = expected_backups(keep, a_day, PROVEN_EVERY_DAYS.get(kind, 7))
    return Need(which, kind, number, fmean(sizes), sum(sizes))


def read_needs(env: Environment) -> tuple[tuple[Need, ...], tuple[str, ...]]:
    """What each set of stores will need for each kind of backup, and why some could not be read."""
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
            if isinstance(found, Stored):
                needs.append(need_of(which, kind, found.backups, rule_of(env, which).keep))
            else:
                problems.append(found.message)
    return tuple(needs), tuple(problems)
