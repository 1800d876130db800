"""Backups whose content shrank: what an earlier backup has and a later one lacks, by table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from blocks.places import Keep
from tasks.backups.catalogue import Backup

ALL = "all tables"
FEWEST = 10
"""Smaller tables (a version, a lock, a few settings) change completely. They count in the sum of all tables."""


@dataclass(frozen=True)
class Shrunk:
    """One table, or the keys of a Redis database: its rows in the earlier backup, and in the later one."""

    table: str
    before: int
    after: int

    @property
    def ratio(self) -> float:
        """The share of the rows that the later one lacks."""
        return (self.before - self.after) / self.before

    @property
    def text(self) -> str:
        """`public.users: 23,180 → 2 rows`."""
        return f"{self.table}: {self.before:,} → {self.after:,} rows"


@dataclass(frozen=True)
class Drop:
    """The last backup before tables shrank."""

    backup: Backup
    tables: tuple[Shrunk, ...]

    @property
    def text(self) -> str:
        """The tables that shrank most."""
        most = sorted(self.tables, key=lambda one: -abs(one.after - one.before))
        more = f" (and {len(most) - 3} more)" * (len(most) > 3)
        return "; ".join(one.text for one in most[:3]) + more


def rows_of(backup: Backup) -> dict[str, int]:
    """The rows of each table, or the keys without a TTL of each Redis database. Empty for other kinds, and for a
    manifest that has no such content."""
    content = backup.manifest.content
    try:
        match backup.manifest.kind:
            case "postgres":
                rows = {str(name): int(table["rows"]) for name, table in content["tables"].items()}
            case "redis":
                rows = {f"db {name}": int(one["persistent_keys"]) for name, one in content["databases"].items()}
            case _:
                return {}
    except (AttributeError, KeyError, TypeError, ValueError):  # judged where it is restored
        return {}
    return {ALL: sum(rows.values()), **rows}


def differences(before: Backup, after: Backup) -> str:
    """The tables whose numbers of rows differ most, as a clause; empty if none does."""
    old, new = rows_of(before), rows_of(after)
    changed = [Shrunk(name, old.get(name, 0), new.get(name, 0)) for name in {**old, **new}]
    return Drop(before, tuple(one for one in changed if one.before != one.after)).text


def shrunk_tables(before: Backup, after: Backup) -> tuple[Shrunk, ...]:
    """The tables that have fewer rows in `after`. A table that was dropped has none."""
    return _shrunk(rows_of(before), rows_of(after), 0)


def _shrunk(before: dict[str, int], after: dict[str, int], ratio: float) -> tuple[Shrunk, ...]:
    found = [Shrunk(name, rows, after.get(name, 0)) for name, rows in before.items() if rows >= FEWEST or name == ALL]
    return tuple(one for one in found if one.before and one.ratio > ratio)


def drops(earlier: Iterable[Backup], later: Backup, ratio: float) -> list[Drop]:
    """The last backup before each table shrank to what `later` has, newest first. A table that has grown again is none.
    Backups that failed a proof do not count; of the others the last one, and the last proven one.
    """
    before = [one for one in earlier if one.manifest.taken < later.manifest.taken and not one.failed]
    before.sort(key=lambda one: one.manifest.taken, reverse=True)
    found, now = dict[str, Drop](), rows_of(later)
    for wanted in (before, [one for one in before if one.is_proven]):
        known = set[str]()
        for backup in wanted if now else ():
            tables = tuple(one for one in _shrunk(rows_of(backup), now, ratio) if one.table not in known)
            if tables:
                known.update(one.table for one in tables)
                found.setdefault(backup.name, Drop(backup, tables))
    return sorted(found.values(), key=lambda one: one.backup.manifest.taken, reverse=True)


def kept_for_drops(ordered: Sequence[Backup], keep: Keep, ratio: float) -> list[Drop]:
    """Those of an environment's backups, oldest first, that are the last ones before a drop, as long as `keep` keeps
    any."""
    good = [one for one in ordered if not one.failed]
    if not good:
        return []
    longest = timedelta(hours=keep.hours, days=max(keep.daily, 7 * keep.weekly, 31 * keep.monthly))
    newest = good[-1]
    return drops((one for one in good if newest.manifest.taken - one.manifest.taken < longest), newest, ratio)
