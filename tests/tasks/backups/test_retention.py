"""Which backups stay, by the rule alone: tiers, zones whose clocks change, proofs, gaps, chains, clocks that jumped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from blocks.places import Keep
from runbook import clock
from tasks.backups.catalogue import Backup
from tasks.backups.encryption import Key
from tasks.backups.manifest import Kind, Manifest
from tasks.backups.retention import RetentionRule, StoredBackup, expected_backups, most_unattended, reasons_to_stay
from tasks.cluster.content import ClusterContent, cluster_in
from tasks.stores.directory import DirectoryStore
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.archive.prune import OldWal, find_old_wal
from tasks.wal.format.names import SEGMENT_BYTES, Segment, Timeline, lsn_text

NEW_YORK = ZoneInfo("America/New_York")
NOW = datetime(2026, 12, 31, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAILY_ONLY = Keep(hours=48, daily=3650, weekly=0, monthly=0, verified=1)


def backup(
    taken: datetime, kind: Kind = "postgres", *, verified: bool = False, failed: bool = False, base: str = ""
) -> Backup:
    name = f"backup_{taken.astimezone(UTC):%Y%m%d_%H%M%S}"
    content = (
        {}
        if kind != "cluster"
        else ClusterContent(
            form="incremental" if base else "full",
            base=base,
            system=1,
            timeline=1,
            start_lsn="0/1000000",
            next_xid=1,
            stop_lsn="0/2000000",
            stopped=taken,
            server_version=180000,
            segment_bytes=1 << 24,
            bytes=1,
            database="d",
        ).model_dump(mode="json")
    )
    manifest = Manifest(
        kind=kind,
        name=name,
        environment="trial",
        taken=taken,
        seconds=1.0,
        host="db",
        tool="pg_dump",
        files={},
        content=content,
    )
    return Backup(Path(name), manifest, DirectoryStore(Path("store")), "x" if verified else "", "x" if failed else "")


def stay(backups: Sequence[Backup], keep: Keep, now: datetime = NOW) -> list[Backup]:
    reasons = reasons_to_stay(backups, RetentionRule(keep, NEW_YORK), now)
    return sorted((one for one in backups if one.name in reasons), key=lambda one: one.manifest.taken)


def days(backups: Sequence[Backup], form: str = "%m-%d %H:%M") -> list[str]:
    return [one.manifest.taken.astimezone(NEW_YORK).strftime(form) for one in backups]


def hourly(first: datetime, last: datetime) -> list[Backup]:
    """One each hour of the world's clock, the newest verified."""
    taken = [first + n * HOUR for n in range(int((last - first) / HOUR) + 1)]
    return [*map(backup, taken[:-1]), backup(taken[-1], verified=True)]


def test_a_year_of_hourly_backups_keeps_the_newest_of_each_tier() -> None:
    """By a calculation of its own: sets of days, weeks and months that the rule does not know."""
    every = hourly(NOW - timedelta(days=400), NOW)
    keep = Keep(hours=48, daily=30, weekly=8, monthly=12, verified=1)
    found = {one.name for one in stay(every, keep)}
    expected = {one.name for one in every if NOW - one.manifest.taken < 48 * HOUR}
    local = {one.name: one.manifest.taken.astimezone(NEW_YORK) for one in every}
    for form, number in (("%Y-%m-%d", 30), ("%G-%V", 8), ("%Y-%m", 12)):
        newest = {moment.strftime(form): name for name, moment in local.items()}  # the later one replaces the earlier
        expected |= {newest[period] for period in sorted(newest)[-number:]}
    assert found == expected
    before_the_next = len(found) + 24
    assert before_the_next <= expected_backups(keep, 24) <= before_the_next * 1.1
    again = [one for one in every if one.name in found]
    assert {one.name for one in stay(again, keep)} == found, "pruning twice deletes nothing more"


def test_pruned_every_night_the_same_stay_as_pruned_once() -> None:
    """What a later tier needs is never deleted by an earlier run."""
    keep, store = Keep(hours=24, daily=7, weekly=4, monthly=6, verified=1), list[Backup]()
    every = hourly(NOW - timedelta(days=250), NOW)
    for number, one in enumerate(every):
        store = [*(each for each in store if not (each.verified and number % 24)), one]
        if one.manifest.taken.hour == 4:
            proven = backup(one.manifest.taken, verified=True)
            store = stay([*store[:-1], proven], keep, one.manifest.taken)
    assert set(days(stay(store, keep), "%m-%d")) >= set(days(stay(every, keep), "%m-%d"))
    assert len(store) < 60


@pytest.mark.parametrize(("month", "day", "hours"), [(3, 8, 23), (11, 1, 25), (7, 4, 24)])
def test_one_of_a_day_stays_also_where_clocks_change(month: int, day: int, hours: int) -> None:
    first = datetime(2026, month, day, tzinfo=NEW_YORK).astimezone(UTC)
    taken = [first + n * HOUR for n in range(hours)]
    assert {f"{one.astimezone(NEW_YORK):%d}" for one in taken} == {f"{day:02}"}
    found = stay([*map(backup, taken), backup(NOW - HOUR, verified=True)], DAILY_ONLY)
    assert days(found) == [f"{month:02}-{day:02} 23:00", "12-31 14:00"]


@pytest.mark.parametrize(
    ("keep", "taken", "expected"),
    [
        # The end of a month, and a week that belongs to two months and two years (2026-W53).
        (
            {"monthly": 3},
            ["2026-09-30 23:59", "2026-10-01 00:01", "2026-10-31 23:59", "2026-11-01 00:01", "2026-12-30 10:00"],
            ["2026-10-31 23:59", "2026-11-01 00:01", "2026-12-30 10:00"],
        ),
        (
            {"weekly": 2},
            ["2026-12-20 12:00", "2026-12-21 12:00", "2026-12-27 23:59", "2026-12-28 00:01", "2026-12-30 12:00"],
            ["2026-12-27 23:59", "2026-12-30 12:00"],
        ),
        # Gaps: so many days that have a backup, not so many days ago.
        (
            {"daily": 3},
            ["2026-02-01 12:00", "2026-05-01 12:00", "2026-05-01 18:00", "2026-12-30 12:00"],
            ["2026-02-01 12:00", "2026-05-01 18:00", "2026-12-30 12:00"],
        ),
        # No tier at all: the hours, and the newest verified one.
        (
            {},
            ["2026-12-30 12:00", "2026-12-30 16:00", "2026-12-31 11:00", "2026-12-31 12:00"],
            ["2026-12-30 16:00", "2026-12-31 11:00", "2026-12-31 12:00"],
        ),
    ],
)
def test_periods(keep: dict[str, int], taken: list[str], expected: list[str]) -> None:
    moments = [datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=NEW_YORK) for text in taken]
    rule = Keep(**({"hours": 24, "daily": 0, "weekly": 0, "monthly": 0, "verified": 1} | keep))
    backups = [*map(backup, moments[:-1]), backup(moments[-1], verified=True)]
    assert days(stay(backups, rule), "%Y-%m-%d %H:%M") == expected


def test_no_unproven_backup_goes_while_no_newer_one_is_proven() -> None:
    every = [backup(NOW - n * HOUR) for n in range(2000, 0, -1)]
    keep = Keep(hours=48, daily=30, weekly=0, monthly=0, verified=1)
    assert stay(every, keep) == every, "nothing is verified"
    old = backup(NOW - timedelta(hours=1999.5), verified=True)
    assert len(stay([*every, old], keep)) == 2000, "of those before the only verified one there is one"
    middle = backup(NOW - timedelta(hours=1000.5), verified=True)
    found = stay([*every, middle], keep)
    assert len([one for one in found if one.manifest.taken > middle.manifest.taken]) == 1000
    assert len(found) == 1001, "30 days are after it"
    assert stay([*every, middle], Keep(verified=2)) == [*every[:1000], middle, *every[1000:]], "two are to be verified"
    proofs = [backup(NOW - timedelta(hours=n + 0.5), verified=True) for n in (1900, 1000, 1)]
    assert {one.name for one in proofs} < {one.name for one in stay([*every, *proofs], Keep(verified=3, monthly=0))}


def test_data_that_breaks_a_rule_is_pruned_and_leaves_the_last_that_kept_it() -> None:
    """A rule that is broken for a year must not fill the disk; and its backups replace no good one."""
    keep = Keep(hours=24, daily=7, weekly=0, monthly=0, verified=2)
    good = [backup(NOW - timedelta(days=100 + n), verified=True) for n in range(3)]
    bad = [dataclasses.replace(backup(NOW - timedelta(days=n, hours=1)), broken="x") for n in range(90)]
    stays = stay([*good, *bad], keep)
    assert [one.name for one in good if one in stays] == [one.name for one in good[:2]]
    assert len(stays) < 12


def test_of_one_period_the_verified_one_stays_and_a_failed_one_is_the_last_choice() -> None:
    noon, newest = datetime(2026, 5, 5, 12, tzinfo=NEW_YORK), backup(NOW - HOUR, verified=True)
    later = noon + 2 * HOUR
    for two, expected in (
        ([backup(noon, verified=True), backup(later)], "12:00"),
        ([backup(noon), backup(later, failed=True)], "12:00"),
        ([backup(noon), backup(later)], "14:00"),
        ([backup(noon, verified=True), backup(later, verified=True)], "14:00"),
    ):
        assert days(stay([*two, newest], DAILY_ONLY), "%H:%M") == [expected, "14:00"]


def test_clocks_that_jump_make_no_backup_old(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Keep(hours=48, daily=30, weekly=8, monthly=12, verified=1)
    every = hourly(NOW - timedelta(days=60), NOW)
    whole = stay(every, keep)
    assert stay(whole, keep, NOW + timedelta(days=3650)) == whole, "ahead: ages count from the newest backup"
    assert stay(every, keep, NOW - timedelta(days=5)) == every, "back: some are of the future"
    stopped = [backup(NOW - timedelta(days=200 + n), verified=True) for n in range(3)]
    assert len(stay(stopped, keep)) == 3, "backups that stopped long ago are all that there is"
    monkeypatch.setattr(clock, "now", lambda: NOW - timedelta(days=5))
    stored = StoredBackup(tuple(every), (), (backup(NOW - timedelta(days=300), "redis"),))
    assert stored.doomed(RetentionRule(keep, NEW_YORK)) == ()


def test_a_base_backup_stays_while_an_incremental_one_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)
    chains, base = list[Backup](), ""
    for day in range(70, 0, -1):
        full = day % 7 == 0
        one = backup(NOW - timedelta(days=day), "cluster", verified=day == 1, base="" if full else base)
        base = one.name
        chains.append(one)
    rule = RetentionRule(Keep(hours=48, daily=10, weekly=2, monthly=2, verified=1), NEW_YORK)
    doomed = StoredBackup(tuple(chains), ()).doomed(rule)
    left = {one.name for one in chains} - {one.name for one in doomed}
    known = {one.name: one for one in chains}
    for name in left:
        needed = known[name].manifest.content["base"]
        assert not needed or needed in left
    assert [one.manifest.taken for one in doomed] == sorted((one.manifest.taken for one in doomed), reverse=True)
    reasons = Counter(reasons_to_stay(chains, rule, NOW).values())
    assert reasons["a later one is incremental to it"] > 0
    assert len(left) == 14 + 5, "ten days and what they need, two weeks to the full one; November's last and its chain"


@pytest.mark.parametrize("kind", ["tables", "schema", "sql"])
def test_what_is_taken_by_hand_is_not_thinned_but_goes_with_the_daily_tier(kind: Kind) -> None:
    noon = NOW - timedelta(days=20)
    ages = [backup(noon, kind), backup(noon + 2 * HOUR, kind), backup(NOW - timedelta(days=31), kind)]
    keep = Keep(hours=48, daily=30, weekly=8, monthly=12, verified=1)
    assert stay([*ages, backup(NOW, kind, verified=True)], keep)[:-1] == ages[:2]


def test_what_one_unattended_run_deletes_at_most() -> None:
    assert [most_unattended(number, 0.5) for number in (1, 3, 10, 961)] == [1, 1, 5, 480]


FIRST = Timeline(1)


def test_wal_stays_as_far_as_the_kept_base_backups_need_it(tmp_path: Path) -> None:
    """Half a year of weekly full and daily incremental base backups, four segments a day: the daily tier's time without a gap,
    of older base backups what they span, and nothing else."""
    archive = Archive(DirectoryPlace(tmp_path), Key())
    begin, a_day = NOW - timedelta(days=181), 4
    for number in range(182 * a_day):
        (tmp_path / f"{Segment(number, 1).name}-{number:064x}.gz").touch()
    every, base = list[Backup](), ""
    for day in range(182):
        one = based(begin + timedelta(days=day), day * a_day, "" if day % 7 == 0 else base, verified=day % 7 == 0)
        every, base = [*every, one], one.name
    keep = Keep(hours=48, daily=30, weekly=8, monthly=12, verified=3)
    kept = stay(every, keep)
    old = find_old_wal.work(archive, 1, kept, RetentionRule(keep, NEW_YORK).window, FIRST)
    gone = {Segment.named(one.of).number for one in old.doomed}
    left = set(range(182 * a_day)) - gone
    window = next(day for day in range(181, 0, -1) if NOW - (begin + timedelta(days=day)) >= timedelta(days=30))
    assert left >= set(range(window * a_day, 182 * a_day)), "any moment of thirty days"
    spans = {
        n
        for one in kept
        for n in range(cluster_in(one).start // SEGMENT_BYTES, -(-cluster_in(one).stop // SEGMENT_BYTES))
    }
    assert left == spans | set(range(window * a_day, 182 * a_day))
    assert len(left) < 31 * a_day + 2 * len(kept)
    unproven = [replace(one, verified="") for one in kept]
    before_all = old_before(old, kept[0])
    assert find_old_wal.work(archive, 1, unproven, timedelta(days=30), FIRST).doomed == before_all, (
        "none of them may restore"
    )
    only = [replace(one, verified="x" if one is kept[0] else "") for one in kept]
    assert find_old_wal.work(archive, 1, only, timedelta(days=30), FIRST).doomed == before_all
    assert find_old_wal.work(archive, 2, kept, timedelta(days=30), FIRST).doomed == (), (
        "another cluster's is all that is left"
    )


def based(taken: datetime, first: int, base: str, *, verified: bool) -> Backup:
    """A base backup that spans two segments from `first` on."""
    made = backup(taken, "cluster", verified=verified, base=base)
    start = first * SEGMENT_BYTES + 40
    content = made.manifest.content | {"start_lsn": lsn_text(start), "stop_lsn": lsn_text(start + SEGMENT_BYTES)}
    return replace(made, manifest=made.manifest.model_copy(update={"content": content}))


def old_before(old: OldWal, first: Backup) -> tuple[object, ...]:
    """Of those only what lies before a base backup."""
    number = cluster_in(first).start // SEGMENT_BYTES
    return tuple(one for one in old.doomed if Segment.named(one.of).number < number)
