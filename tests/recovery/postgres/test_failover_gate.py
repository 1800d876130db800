"""The gate of a promotion and of a rejoin: the plan says what the run loses, and a run that would lose more replaces
nothing and leaves the services as it found them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.point.restore import restore_to_point
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from flows.recovery.postgres.rejoin_checks import Method
from flows.recovery.undo_full_restore import undo_full_restore
from lab.servers.postgres import DATABASE
from runbook import kinds
from runbook.errors import NotConfirmed, RunbookFailed
from runbook.guard.loss import Loss
from runbook.report import Status
from runbook.wait import until
from tasks.failover.member import control_of
from tasks.wal.archive.destinations import ship_now
from tests.fixtures.postgres.clusters import NAME, PROGRAMS, Cluster, running_cluster
from tests.fixtures.postgres.templates import Template
from tests.fixtures.reports import text_of as finding
from tests.recovery.postgres_failovers import address, fail_over, lost, refused, rejoin

ROWS = 5


@pytest.fixture
def asynchronous(cluster_template: Template, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose commits wait for nobody."""
    with running_cluster(cluster_template, settings=["synchronous_standby_names = ''"]) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        yield cluster


def at(monkeypatch: pytest.MonkeyPatch, place: str, act: Callable[[], object]) -> None:
    """Something else happens there, once, in the middle of a run."""
    acts = iter([act])

    def between(name: str) -> None:
        if name == place:
            for one in acts:
                one()

    monkeypatch.setattr(kinds, "failpoint", between)


def running(cluster: Cluster) -> dict[str, bool]:
    """The services that are started, or that their supervisor tries to start."""
    stopped = ("STOPPED", "EXITED", "FATAL")
    return {name: service.state not in stopped for name, service in cluster.supervisor.services().items()}


def insert_alone(cluster: Cluster, role: str, first: int, rows: int = ROWS) -> None:
    """Acknowledged commits that wait for nobody, whatever the mode of replication is."""
    for number in range(first, first + rows):
        cluster.sql(role, f"SET synchronous_commit = local; INSERT INTO t VALUES ({number})")


def ids(cluster: Cluster, role: str) -> list[int]:
    return [number for (number,) in cluster.sql(role, "SELECT id FROM t ORDER BY id")]


def test_what_only_the_dead_primary_has_is_replayed_and_the_plan_says_so(asynchronous: Cluster) -> None:
    cluster = asynchronous
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.stop("standby", "receiver")
        writes.wait(100)
        cluster.crash("postgres")
        cluster.start("standby")
        plan = postgres_failover.fn(NAME, mode="unplanned")
        assert f"nothing of {DATABASE}" in plan.headline or "nothing is lost" in plan.headline
        report = fail_over("unplanned", **plan.pins)
        writes.wait(20)
    assert lost(cluster, "standby", writes) == set()
    assert report.losses[DATABASE] == Loss(DATABASE)


def test_commits_that_did_not_wait_in_a_synchronous_cluster_are_replayed_too(cluster: Cluster) -> None:
    """`synchronous_commit = local`: acknowledged, and on the dead primary's disk only."""
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    cluster.stop("standby", "receiver")
    insert_alone(cluster, "postgres", 1)
    cluster.crash("postgres")
    cluster.start("standby")
    report = fail_over("unplanned")
    assert ids(cluster, "standby") == list(range(1, ROWS + 1))
    assert report.losses[DATABASE] == Loss(DATABASE)


def test_with_the_dead_primarys_directory_deleted_the_loss_is_unknown(asynchronous: Cluster) -> None:
    cluster = asynchronous
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.stop("standby", "receiver")
        writes.wait(50)
        cluster.crash("postgres")
        acknowledged = set(writes.acknowledged)
        shutil.rmtree(cluster.node("postgres").data)
        cluster.start("standby")
        plan = postgres_failover.fn(NAME, mode="unplanned")
        assert f"the loss of {DATABASE} is unknown, because {cluster.node('postgres').data} is missing" in plan.headline
        report = fail_over("unplanned", **plan.pins)
    assert acknowledged & lost(cluster, "standby", writes)
    assert "is missing" in report.losses[DATABASE].unknown
    assert "is missing" in finding(report, "acknowledged writes lost")
    for name in ("settings of ALTER SYSTEM", "replication slots"):
        assert "not known: " in finding(report, name)


def test_a_directory_that_disappears_after_the_plan_stops_the_run(
    asynchronous: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between plan and confirmation, and between confirmation and promotion."""
    cluster, data = asynchronous, asynchronous.node("postgres").data
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    cluster.settle()
    cluster.crash("postgres")
    plan, before = postgres_failover.fn(NAME, mode="unplanned"), running(cluster)
    assert "unknown" not in plan.headline
    with cluster.gone(data), pytest.raises(NotConfirmed, match="commits lost was 0, is unknown"):
        fail_over("unplanned", **plan.pins)
    aside = data.with_name("aside")
    at(monkeypatch, "before feed", lambda: data.rename(aside))
    with pytest.raises(RunbookFailed, match="is missing"):
        fail_over("unplanned", **plan.pins)
    aside.rename(data)
    until(lambda: running(cluster) == before, what="the services as they were found", seconds=60)
    assert cluster.is_standby("standby")
    assert not (cluster.root / "reports" / "postgres-failover.json").exists()
    report = fail_over("unplanned")
    assert report.losses[DATABASE] == Loss(DATABASE)
    assert ids(cluster, "standby") == []


def test_a_standby_on_the_branch_that_an_undo_left_is_not_promoted(cluster: Cluster) -> None:
    abandoned(cluster)
    cluster.crash("postgres")
    shutil.rmtree(cluster.node("postgres").data)
    report = refused("unplanned")
    assert finding(report, "timeline in use").startswith("CRITICAL 1"), report.sentence()
    assert cluster.is_standby("standby")


def abandoned(cluster: Cluster) -> None:
    """The standby follows a restore, whose undo puts the primary on the lower timeline again."""
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    backup_cluster.fn(NAME)
    cluster.sql("postgres", "INSERT INTO t VALUES (1)")
    restore_to_point.fn(NAME, by="latest", confirm=NAME)
    rejoin()
    for number in range(100, 100 + ROWS):
        cluster.sql("postgres", f"INSERT INTO t VALUES ({number})")
    cluster.settle()
    undo_full_restore.fn(NAME, confirm=NAME)
    cluster.sql("postgres", "INSERT INTO t VALUES (2)")
    ship_now(cluster.environment)
    if not running(cluster)[PROGRAMS["standby"]]:
        cluster.start("standby")
    assert ids(cluster, "postgres") == [1, 2]
    assert ids(cluster, "standby")[-1] == 99 + ROWS


def test_what_a_server_has_of_a_branch_that_was_left_is_counted_before_it_rejoins(cluster: Cluster) -> None:
    abandoned(cluster)
    plan, node = rejoin_standby.fn(NAME), address(cluster, "standby")
    planned = re.search(rf"([0-9]+) commits of {node} are lost", plan.headline)
    assert planned, plan.headline
    report = rejoin(**plan.pins)
    assert ROWS <= (report.losses[node].count or 0) == int(planned[1])  # those of the restore itself are among them
    assert report.status in (Status.OK, Status.WARN)
    cluster.settle()
    assert ids(cluster, "standby") == [1, 2]


@pytest.mark.parametrize("method", ["auto", "base_backup"])
def test_commits_that_an_old_primary_took_after_the_plan_stop_its_rejoin(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    """Somebody starts it as a primary, and stops it again: between plan and confirmation, and within the run."""
    data, old = cluster.node("postgres").data, address(cluster, "postgres")
    cluster.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)")
    cluster.settle()
    cluster.crash("postgres")
    fail_over("unplanned")

    def write(first: int) -> None:
        (data / "standby.signal").unlink(missing_ok=True)
        cluster.start("postgres")
        insert_alone(cluster, "postgres", first)
        cluster.stop("postgres")

    write(1)
    plan = rejoin_standby.fn(NAME, method=method)
    assert f"{ROWS} commits of {old} are lost" in plan.headline
    write(11)
    with pytest.raises(NotConfirmed, match=f"commits lost was {ROWS}, is {2 * ROWS}"):
        rejoin(method=method, **plan.pins)
    again, before = rejoin_standby.fn(NAME, method=method), running(cluster)
    at(monkeypatch, "before mark_standby", lambda: write(21))
    with pytest.raises(RunbookFailed, match=f"{3 * ROWS} commits of {old} are lost"):
        rejoin(method=method, **again.pins)
    assert running(cluster) == before
    assert not (data / "standby.signal").exists()
    assert not list(Path(data).parent.glob("*.superseded_*"))
    cluster.start("postgres")
    assert len(ids(cluster, "postgres")) == 3 * ROWS
    cluster.stop("postgres")
    report = rejoin(method=method)
    assert report.losses[old].count == 3 * ROWS


def test_a_history_that_a_standby_fetched_is_not_the_timeline_that_it_follows(cluster: Cluster) -> None:
    """A standby that had replayed more of the old timeline was started, streamed for a moment, and "had rejoined". A
    primary that has a newer history was promoted, perhaps only just."""
    for role, timeline in (("standby", 1), ("postgres", 2)):
        history = cluster.node(role).data / "pg_wal" / "00000002.history"
        history.write_text("1\t0/3000060\tno recovery target specified\n")
        server = cluster.environment.standby if role == "standby" else cluster.environment.postgres
        control = control_of(server)
        assert control
        assert control.timeline == timeline
