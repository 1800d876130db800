"""Backups whose content shrank: the last one before the drop, by the manifests alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from blocks.places import Keep
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind, Manifest
from tasks.backups.retention import RetentionRule, reasons_to_stay
from tasks.backups.shrinkage import ALL, drops, rows_of
from tasks.stores.directory import DirectoryStore

NEWEST = datetime(2026, 11, 30, tzinfo=UTC)


def backup(days: float, kind: Kind = "postgres", *, proven: bool = True, **rows: int) -> Backup:
    taken = NEWEST - timedelta(days=days)
    content: dict[str, object] = {"tables": {name: {"rows": number} for name, number in rows.items()}}
    if kind == "redis":
        content = {"databases": {name: {"persistent_keys": number} for name, number in rows.items()}}
    manifest = Manifest(
        kind=kind,
        name=f"backup_{taken:%Y%m%d_%H%M%S}",
        environment="trial",
        taken=taken,
        seconds=1.0,
        host="db",
        tool="pg_dump",
        files={},
        content=content,
    )
    return Backup(Path(manifest.name), manifest, DirectoryStore(Path("store")), "x" if proven else "")


def found(*backups: Backup) -> list[tuple[str, str]]:
    return [(one.backup.name, one.text) for one in drops(backups[:-1], backups[-1], 0.5)]


def test_the_last_backup_before_the_drop_is_found_behind_emptied_ones() -> None:
    older, last = backup(5, users=23_000), backup(4, users=23_182)
    emptied = (backup(3, users=2), backup(2, users=2))
    text = f"{ALL}: 23,182 → 2 rows; users: 23,182 → 2 rows"
    assert found(older, last, *emptied, backup(0, users=2)) == [(last.name, text)]
    assert found(older, last, *emptied, backup(0, users=23_000)) == [], "the rows are back"


def test_each_table_has_its_own_last_backup_and_a_dropped_one_has_no_rows() -> None:
    first, second = backup(3, users=100, orders=5000), backup(2, users=100)
    assert found(first, second, backup(1, users=3), backup(0, users=3)) == [
        (second.name, f"{ALL}: 100 → 3 rows; users: 100 → 3 rows"),
        (first.name, "orders: 5,000 → 0 rows"),
    ]


def test_what_is_not_proven_stands_beside_the_last_proven_one_and_what_failed_counts_nothing() -> None:
    proven, last, failed = backup(3, users=100), backup(2, users=100, proven=False), backup(1, users=100, proven=False)
    names = [name for name, _ in found(proven, last, replace(failed, failed="x"), backup(0, users=1))]
    assert names == [last.name, proven.name]


def test_small_tables_and_small_losses_are_none() -> None:
    assert found(backup(1, version=1, users=100, locks=9), backup(0, users=60)) == []
    assert found(backup(1, locks=9), backup(0, locks=0)) == [(backup(1).name, f"{ALL}: 9 → 0 rows")], (
        "everything is lost"
    )


def test_keys_of_redis_count_and_other_kinds_do_not() -> None:
    assert found(backup(1, "redis", keys=1000), backup(0, "redis", keys=10))
    assert rows_of(backup(0, "files")) == {}
    assert rows_of(replace(backup(0), manifest=backup(0).manifest.model_copy(update={"content": {"tables": 5}}))) == {}


def test_retention_keeps_it_as_long_as_the_longest_tier() -> None:
    keep = Keep(hours=24, daily=0, weekly=0, monthly=3, verified=1)
    rule = RetentionRule(keep, ZoneInfo("UTC"))
    old, last = backup(41, users=100), backup(40, users=100)
    emptied = [backup(days, users=1) for days in (31, 5, 0)]
    stays = reasons_to_stay([old, last, *emptied], rule, NEWEST)
    assert stays[last.name] == "the last before tables shrank"
    assert old.name not in stays
    late = [
        replace(one, manifest=one.manifest.model_copy(update={"taken": one.manifest.taken + timedelta(days=90)}))
        for one in emptied
    ]
    assert last.name not in reasons_to_stay(
        [old, last, *late],
        RetentionRule(Keep(**keep.model_dump() | {"monthly": 2}), ZoneInfo("UTC")),
        NEWEST + timedelta(days=90),
    )
