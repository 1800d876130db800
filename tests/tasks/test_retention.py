"""Which backups may go, by the rule alone: days of a zone whose clocks change."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from tasks.catalogue import Backup
from tasks.manifest import Kind, Manifest
from tasks.retention import Rule, Stored
from tasks.stores.directory import DirectoryStore

NEW_YORK = ZoneInfo("America/New_York")
RULE = Rule(timedelta(days=36500), 1, timedelta(hours=48), NEW_YORK)


def backup(taken: datetime, kind: Kind = "postgres", *, verified: bool = False, failed: bool = False) -> Backup:
    name = f"backup_{taken.astimezone(UTC):%Y%m%d_%H%M%S}"
    manifest = Manifest(kind=kind, name=name, environment="trial", taken=taken, seconds=1.0, host="db", tool="pg_dump",
                        files={}, content={})  # fmt: skip
    return Backup(Path(name), manifest, DirectoryStore(Path("store")), "x" if verified else "", "x" if failed else "")


def stays(backups: Sequence[Backup], rule: Rule = RULE) -> list[str]:
    stored = Stored(tuple(sorted(backups, key=lambda one: one.manifest.taken)), ())
    doomed = {one.name for one in stored.doomed(rule)}
    return [one.manifest.taken.astimezone(NEW_YORK).strftime("%d %H:%M") for one in stored.backups
            if one.name not in doomed]  # fmt: skip


def of_day(year: int, month: int, day: int, step: timedelta = timedelta(hours=1)) -> list[datetime]:
    """Every hour of a day of New York, by the clock of the world."""
    first = datetime(year, month, day, tzinfo=NEW_YORK).astimezone(UTC)
    last = datetime(year, month, day, 23, 59, tzinfo=NEW_YORK).astimezone(UTC)
    return [first + n * step for n in range(int((last - first) / step) + 1)]


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 8, 23), (11, 1, 25), (7, 4, 24)])
def test_one_of_a_day_stays_also_where_clocks_change(month: int, day: int, hours: int) -> None:
    taken = of_day(2025 if month == 7 else 2026, month, day)
    assert len(taken) == hours
    verified = backup(datetime.now(UTC) - timedelta(hours=1), verified=True)
    found = stays([*map(backup, taken), verified])
    assert found == [f"{day:02} 23:00", f"{verified.manifest.taken.astimezone(NEW_YORK):%d %H:%M}"]


def test_of_the_last_two_days_and_since_the_newest_verified_all_stay() -> None:
    now = datetime.now(UTC)
    hourly = [backup(now - timedelta(hours=hours, minutes=1)) for hours in range(120)]
    newest = backup(now - timedelta(seconds=30), verified=True)
    left = len(stays([*hourly, newest]))
    assert 48 + 1 + 3 <= left <= 48 + 1 + 4, "two days whole, one of each of those before, and the newest"
    old = backup(now - timedelta(hours=119.5), verified=True)
    assert len(stays([*hourly, old])) == 121, "nothing stands in for what is newer than the newest verified one"
    assert len(stays(hourly)) == 120, "nothing is verified"


def test_the_verified_one_of_a_day_is_the_one_that_stays_and_a_failed_one_is_the_last_choice() -> None:
    noon = datetime(2026, 5, 5, 12, tzinfo=NEW_YORK)
    newest = backup(datetime.now(UTC) - timedelta(hours=1), verified=True)
    one, two = backup(noon, verified=True), backup(noon + timedelta(hours=2))
    assert stays([one, two, newest])[0] == "05 12:00"
    assert stays([backup(noon), backup(noon + timedelta(hours=2), failed=True), newest])[0] == "05 12:00"
    assert len(stays([one, two, newest])) == 2
    assert len(stays([one, backup(noon + timedelta(hours=2), verified=True), newest], Rule(
        timedelta(days=36500), 3, timedelta(hours=48), NEW_YORK))) == 3, "the newest verified ones stay anyway"  # fmt: skip


@pytest.mark.parametrize("kind", ["cluster", "tables", "schema", "sql", "prefect"])
def test_what_is_taken_on_purpose_is_not_thinned(kind: Kind) -> None:
    noon = datetime(2026, 5, 5, 12, tzinfo=NEW_YORK)
    newest = backup(datetime.now(UTC) - timedelta(hours=1), kind, verified=True)
    assert len(stays([backup(noon, kind), backup(noon + timedelta(hours=2), kind), newest])) == 3
