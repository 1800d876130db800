"""Retention of base backups and archived WAL, by a clock that the test advances: real base backups (a full one each
Sunday, incremental ones between), real WAL, real decisions and deletions, in both places, by the schedules of
prefect.yaml."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from blocks.environment import Environment, Stores
from flows.database.backup import prune_backups, verify_backup
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.recovery.point.restore import restore_to_point
from runbook import clock
from runbook.report import Status
from tasks.backups import catalogue, manifest
from tasks.backups.catalogue import Backup
from tasks.backups.retention import read_store
from tasks.cluster.content import cluster_in
from tasks.stores.store import store_of
from tasks.wal.archive.destinations import archive_of, destinations_of
from tasks.wal.archiver import WalArchiver
from tasks.wal.format.names import Segment
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.recovery.objectives.test_thirty_days import BEGIN, ENVIRONMENTS, events

GOOD = (Status.OK, Status.WARN)
BRIEF = "{ hours = 24, daily = 2, weekly = 1, monthly = 0, verified = 1 }"
FLOWS = ("backup_cluster", "verify_backup", "prune_backups", "replicate_backups")
SEGMENTS_A_DAY = 2


def is_played(flow: str, parameters: Mapping[str, Any]) -> bool:
    """Everything that concerns base backups; the copies are made of everything at once."""
    return flow in FLOWS and (parameters.get("kind") == "cluster" or flow in ("backup_cluster", "replicate_backups"))


@dataclass
class Days:
    """The simulation: its clock, and what happened."""

    cluster: Cluster
    env: Environment
    now: datetime = BEGIN
    taken: dict[str, datetime] = field(default_factory=dict)
    days: dict[datetime, str] = field(default_factory=dict)
    """A position in the WAL of each day, after its base backup."""
    rows: dict[str, int] = field(default_factory=dict)
    """How many the table had there."""
    forms: list[str] = field(default_factory=list)
    deleted: dict[Stores, int] = field(default_factory=dict)

    def read(self, which: Stores = "backups") -> tuple[Backup, ...]:
        return read_store.work(store_of(self.env, "cluster", which), "cluster", NAME).backups

    def take(self, kind: Any) -> None:
        """A base backup, dated by the test's clock, and a day's WAL after it, shipped to both places."""
        name = backup_cluster.fn(NAME, kind=kind).facts["backup"]
        store = store_of(self.env, "cluster")
        one = catalogue.open_backup(store, name)
        manifest.write(one.path, one.manifest.model_copy(update={"taken": self.now}))
        self.taken[name] = self.now
        self.forms.append(cluster_in(one).form)
        for _ in range(SEGMENTS_A_DAY):
            self.cluster.sql("postgres", "INSERT INTO t SELECT count(*) FROM t; SELECT pg_switch_wal()")
        lsn = str(self.cluster.sql("postgres", "SELECT pg_current_wal_insert_lsn()")[0][0])
        self.days[self.now], self.rows[lsn] = lsn, SEGMENTS_A_DAY * len(self.taken)
        self.cluster.settle()
        WalArchiver(Path(self.env.wal.directory), destinations_of(self.env), keep=1).round(last=True)

    def prune(self, source: Stores) -> None:
        """The very runbook, as its schedule launches it."""
        store = store_of(self.env, "cluster", source)
        before = catalogue.names(store, "cluster")
        report = prune_backups.fn(NAME, kind="cluster", source=source)
        assert report.status in GOOD, report.sentence()
        left = self.read(source)
        gone = set(before) - {one.name for one in left}
        proven = [self.taken[one.name] for one in left if one.is_proven]
        assert all(self.taken[name] < max(proven) for name in gone), "nothing that is newer than the newest proven"
        self.deleted[source] = self.deleted.get(source, 0) + len(gone)

    def segments(self, which: Stores) -> list[int]:
        """The numbers of the whole segments in a place."""
        (system,) = {cluster_in(one).system for one in self.read(which)}
        listing, bytes_ = archive_of(self.env, which, system).listing(), cluster_in(self.read(which)[0]).segment_bytes
        return sorted(Segment.named(name, bytes_).number for name in listing.segments)


@pytest.fixture
def days(cluster: Cluster, keep: str, monkeypatch: pytest.MonkeyPatch) -> Days:
    """The cluster with a second place."""
    path = cluster.root / "pair.toml"
    text = path.read_text()
    own = text[text.index("[backups]") : text.index("[application]")]
    both = own.replace("[backups]", "[backups]\nkeep = " + keep)
    copies = re.sub(f"{cluster.root}/backups", f"{cluster.root}/copies", both).replace("[backups]", "[copies]")
    path.write_text(
        text.replace(own, both + copies).replace(
            "disposable", 'unattended = ["prune-backups"]\nunattended_share = 1.0\ndisposable'
        )
    )
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("runbook.run.is_unattended", lambda target: "prune-backups" in target.unattended)
    monkeypatch.setattr("flows.database.backup.show_backups", lambda report, env: None)  # tested elsewhere
    cluster.sql("postgres", "CREATE TABLE t (n bigint)")
    made = Days(cluster, Environment.find(NAME))
    monkeypatch.setattr(clock, "now", lambda: made.now)
    return made


def keep_of_production() -> str:
    """The shipped retention of both places, which is one."""
    text = (ENVIRONMENTS / "production.toml").read_text(encoding="utf-8")
    (keep,) = set(re.findall(r"(?m)^keep = (.*)$", text))
    return str(keep)


@pytest.mark.parametrize(
    ("keep", "number"),
    [(BRIEF, 10), pytest.param(keep_of_production(), 50, marks=pytest.mark.soak)],
    ids=["brief", "production"],
)
def test_base_backups_and_wal_stay_bounded_and_every_day_of_the_window_can_be_reached(days: Days, number: int) -> None:
    window = timedelta(days=days.env.backups.keep.daily)
    for moment, flow, parameters in events(days.env, is_played, number):
        days.now = moment
        if flow == "backup_cluster":
            days.take(parameters.get("kind", "full"))
        elif flow == "verify_backup":
            assert verify_backup.fn(NAME, kind="cluster").status in GOOD
        elif flow == "replicate_backups":
            assert replicate_backups.fn(NAME, kind="cluster").status in GOOD
        else:
            days.prune(parameters.get("source", "backups"))
    assert days.forms[:8] == ["full", *["incremental"] * 6, "full"]
    for which in get_args(Stores):
        _judge(days, which, window)
    reached = [lsn for moment, lsn in sorted(days.days.items()) if days.now - window <= moment][:-1]
    oldest = days.read()[0].name
    assert verify_backup.fn(NAME, kind="cluster", backup=oldest).status in GOOD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runbook.run.is_unattended", lambda target: False)
        assert restore_to_point.fn(NAME, by="lsn", target=reached[-1]).status is Status.PLANNED
        back = restore_to_point.fn(NAME, by="lsn", target=reached[0], confirm=NAME)
    assert back.status in GOOD, back.sentence()
    assert days.cluster.sql("postgres", "SELECT count(*) FROM t") == [(days.rows[reached[0]],)]


def _judge(days: Days, which: Stores, window: timedelta) -> None:
    left, segments = days.read(which), days.segments(which)
    assert days.deleted[which], "something was deleted"
    keep = days.env.stores(which).keep
    # A chain of incremental ones stays as a whole: a week of them for the oldest day that stays.
    assert len(left) <= keep.daily + 7 * (1 + keep.weekly + keep.monthly)
    newest, verified = (max(days.taken[one.name] for one in some) for some in (left, [o for o in left if o.verified]))
    begin = max(one for one in days.taken.values() if one <= min(newest - window, verified))
    needed = [one for one in left if days.taken[one.name] >= begin]
    bytes_ = cluster_in(left[0]).segment_bytes
    first = min(cluster_in(one).start for one in needed) // bytes_
    of_window = [number for number in segments if number >= first]
    assert all(b - a == 1 for a, b in itertools.pairwise(of_window)), "WAL of the window has no gap"
    spans = {
        n for one in left for n in range(cluster_in(one).start // bytes_, (cluster_in(one).stop - 1) // bytes_ + 1)
    }
    assert set(segments) - set(of_window) <= spans, "older WAL stays for the base backups that need it"
    assert len(of_window) <= (SEGMENTS_A_DAY + 3) * (window.days + 8), "of the window, or since the weekly proof"
