"""A promotion that would lose writes or make two primaries is refused, and nothing was touched."""

from __future__ import annotations

import contextlib

import psycopg
import pytest

from flows.recovery.postgres.failover import postgres_failover
from flows.recovery.postgres.pair import Mode
from runbook.errors import NotConfirmed, OpsError, Unreachable
from runbook.wait import until
from tests.fixtures.postgres.clusters import NAME, PROGRAMS, Cluster, Template, running_cluster
from tests.fixtures.reports import text_of as finding
from tests.recovery.postgres_failovers import address, fail_over, refused, target, verify_turned

BOTH = pytest.mark.parametrize("mode", ["planned", "unplanned"])


def is_untouched(cluster: Cluster) -> bool:
    """Nobody was promoted or fenced, and the application is told what it was told."""
    assert target(cluster) == address(cluster, "postgres")
    assert not (cluster.root / "reports" / "postgres-failover.json").exists()
    return cluster.is_standby("standby") and not (cluster.node("postgres").data / "standby.signal").exists()


def test_the_old_primary_lives(cluster: Cluster) -> None:
    report = refused("unplanned")
    assert "planned" in finding(report, "is dead")
    assert is_untouched(cluster)
    with cluster.frozen("postgres"):
        for _ in range(2):
            report = refused("unplanned", fenced_by="the drill, which is wrong")
            assert "accepts connections" in finding(report, "its port is closed")
    assert is_untouched(cluster)


def test_its_supervisor_would_restart_it(cluster: Cluster) -> None:
    """Its data is away, so that each start fails; with `fence` this run stops it first."""
    data = cluster.node("postgres").data
    with cluster.gone(data):
        cluster.shoot("postgres")
        until(lambda: state(cluster) == "BACKOFF", what="a start that failed", seconds=120)
        report = refused("unplanned")
        told = finding(report, "its supervisor does not run or restart it")
        assert told.startswith("CRITICAL")
        assert "its supervisor would restart it" in told
        assert cluster.is_standby("standby")
        fail_over("unplanned", fence=True)
        assert not cluster.is_standby("standby")
        assert state(cluster) == "STOPPED"


def state(cluster: Cluster) -> str:
    return cluster.supervisor.services()[PROGRAMS["postgres"]].state


@BOTH
def test_replay_is_paused(cluster: Cluster, mode: str) -> None:
    cluster.sql("standby", "SELECT pg_wal_replay_pause()", database="postgres")
    if mode == "unplanned":
        cluster.crash("postgres")
    report = refused(mode)
    assert "pg_wal_replay_resume" in finding(report, "replay is not paused")
    assert is_untouched(cluster)


@BOTH
def test_the_standby_is_of_another_cluster(cluster: Cluster, cluster_template: Template, mode: str) -> None:
    with running_cluster(cluster_template, fresh=True) as other:
        file, login = cluster.root / "pair.toml", cluster.state.passwords.postgres_admin
        for old, new in ((cluster.node("standby"), other.node("standby")),):
            text = file.read_text().replace(f"port = {old.port}", f"port = {new.port}")
            file.write_text(text.replace(str(old.data), str(new.data)))
        other.sql("postgres", f"ALTER ROLE postgres PASSWORD '{login}'")
        until(lambda: knows(other, login), what="its password", seconds=120)
        if mode == "unplanned":
            cluster.crash("postgres")
        report = refused(mode)
        assert finding(report, "system identifier").startswith("CRITICAL"), report.sentence()
        assert knows(other, login)
    assert is_untouched(cluster)


def knows(other: Cluster, password: str) -> bool:
    with contextlib.suppress(psycopg.Error):
        dsn = f"host=127.0.0.1 port={other.node('standby').port} user=postgres password={password} dbname=postgres"
        with psycopg.connect(dsn) as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    return False


def test_the_standby_lags_behind_a_living_primary_and_never_replays_after_its_death(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.sql("standby", "ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
    cluster.stop("standby")  # a reload reaches the process that replays some time later
    cluster.start("standby")
    until(lambda: "standby" in cluster.streaming(), what="its return", seconds=120)
    cluster.sql("postgres", "CREATE TABLE held ()")  # its commit waits, and all that comes after it
    cluster.sql("postgres", "CREATE TABLE much AS SELECT repeat(i::text, 100) FROM generate_series(1, 20000) i")
    report = refused(max_lag_megabytes=1)
    assert "max_lag_megabytes" in finding(report, "lag of the standby")
    assert is_untouched(cluster)
    cluster.crash("postgres")
    for name in ("PATIENCE_SECONDS", "FEED_SECONDS"):
        monkeypatch.setattr(f"tasks.failover.feeding.{name}", 1.0)
    with pytest.raises(OpsError, match="does not replay everything"):
        fail_over("unplanned")
    assert is_untouched(cluster), "the old primary is the only one: started again it must take writes"


def test_more_than_a_standby_may_lack_of_a_dead_primary_is_no_obstacle_where_it_can_be_replayed(
    cluster: Cluster,
) -> None:
    """By the mode of replication nothing of it was acknowledged; this session asked for that."""
    cluster.stop("standby", "receiver")
    cluster.sql(
        "postgres",
        "SET synchronous_commit = local; "
        "CREATE TABLE much AS SELECT repeat(i::text, 100) FROM generate_series(1, 20000) i",
    )
    cluster.crash("postgres")
    cluster.start("standby")
    report = fail_over("unplanned", max_lag_megabytes=1)
    assert report.facts["acknowledged writes lost"].startswith("0 (proven")
    assert cluster.sql("standby", "SELECT count(*) FROM much") == [(20000,)]


@BOTH
def test_the_standby_is_on_another_timeline(cluster: Cluster, mode: str) -> None:
    """The primary has gone through a promotion that the standby does not follow."""
    cluster.sql("standby", "ALTER SYSTEM SET recovery_target_timeline = 'current'")
    cluster.stop("standby", "postgres")
    signal = cluster.node("postgres").data / "standby.signal"
    signal.touch()
    cluster.start("postgres", "standby")
    cluster.promote("postgres")
    assert not signal.exists()
    if mode == "unplanned":
        cluster.crash("postgres")
    report = refused(mode)
    told = finding(report, "timeline")
    assert told.startswith("CRITICAL the old primary: 2"), report.sentence()
    assert is_untouched(cluster)


@BOTH
def test_the_standby_was_promoted_already(cluster: Cluster, mode: Mode) -> None:
    cluster.promote("standby")
    with pytest.raises(OpsError, match="two servers take writes") as caught:
        postgres_failover.fn(NAME, mode=mode, confirm=NAME)
    assert address(cluster, "postgres") in caught.value.message
    assert address(cluster, "standby") in caught.value.message
    assert not cluster.is_standby("postgres")
    assert not cluster.is_standby("standby")


def test_nobody_is_promoted_when_the_primary_is_dead_and_it_was_to_be_planned(cluster: Cluster) -> None:
    cluster.crash("postgres")
    report = refused("planned")
    assert "unplanned" in finding(report, "answers")
    assert is_untouched(cluster)


def test_a_wrong_confirm_changes_nothing(cluster: Cluster) -> None:
    with pytest.raises(NotConfirmed):
        postgres_failover.fn(NAME, confirm="production")
    assert is_untouched(cluster)


def test_what_a_restart_of_the_fenced_one_would_be(cluster: Cluster) -> None:
    """Somebody starts the old primary by hand after the failover: it takes no writes."""
    cluster.crash("postgres")
    fail_over("unplanned")
    with contextlib.suppress(Unreachable):  # where its WAL goes on beyond the promotion, it does not even answer
        cluster.start("postgres")
        assert cluster.is_standby("postgres")
    verify_turned(cluster, joined=False)
