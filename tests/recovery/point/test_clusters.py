"""The clusters of the recovery tests: what streams, what a kill -9 loses and what it does not, and that nothing is left."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import psycopg
import pytest

from lab.servers.nodes import system_of_wal
from runbook.wait import until
from tests.fixtures.postgres.clusters import PROGRAMS, Cluster, Template, running_cluster


def test_both_stream_and_a_commit_waits_for_one_of_them(cluster: Cluster) -> None:
    assert cluster.streaming() == {"standby", "receiver"}
    states = cluster.sql("postgres", "SELECT application_name, sync_state FROM pg_stat_replication ORDER BY 1")
    assert states == [("receiver", "quorum"), ("standby", "quorum")]
    assert not cluster.is_standby("postgres")
    assert cluster.is_standby("standby")
    cluster.sql("postgres", "CREATE TABLE seen AS SELECT 7 AS value")
    until(lambda: there(cluster, "seen"), what="the table on the standby", seconds=120)
    assert cluster.sql("standby", "SELECT value FROM seen") == [(7,)]
    (system,) = cluster.sql("postgres", "SELECT system_identifier FROM pg_control_system()")[0]
    assert system_of_wal(cluster.wal) == system == cluster.node("standby").system
    assert [path.suffix for path in cluster.wal.iterdir()].count(".partial") == 1


def there(cluster: Cluster, table: str) -> bool:
    return cluster.sql("standby", "SELECT to_regclass(%s) IS NOT NULL", table) == [(True,)]


@pytest.mark.parametrize("fed", [True, False], ids=["fed the receiver's tail", "not fed"])
def test_a_killed_primary_loses_nothing_that_was_acknowledged_if_the_standby_gets_the_receivers_tail(
    cluster: Cluster, fed: bool
) -> None:
    """The standby is away while a client writes: only the receiver confirms. Without its tail the writes are lost: so
    this test would notice."""
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.stop("standby")
        writes.wait(200)
        cluster.crash("postgres")
        acknowledged = set(writes.acknowledged)
        if fed:
            cluster.start("standby")
            cluster.promote("standby")
        else:
            with cluster.gone(cluster.wal):
                cluster.start("standby")
                cluster.promote("standby")
        found = cluster.sql("standby", "SELECT id FROM writes")
    lost = acknowledged - {row[0] for row in found}
    assert lost == set() if fed else len(lost) >= 200
    assert len(found) <= len(writes.attempted), "nothing that nobody sent"


@pytest.mark.parametrize("dead", ["standby", "receiver"])
def test_commits_go_on_while_one_of_the_two_is_dead(cluster: Cluster, dead: str) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        with cluster.crashed(dead):
            until(lambda: dead not in cluster.streaming(), what="the break of its stream", seconds=120)
            writes.wait(100)
        until(lambda: dead in cluster.streaming(), what="its return", seconds=120)
        writes.wait(20)
    assert writes.lost(cluster.sql("postgres", "SELECT id FROM writes")) == set()


def test_with_both_dead_a_commit_waits_and_returns_with_the_first_that_is_back(cluster: Cluster) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with cluster.writing(sessions=1) as writes:
        writes.wait(5)
        with cluster.crashed("receiver"), cluster.crashed("standby"):
            until(lambda: not cluster.streaming(), what="the break of both streams", seconds=120)
            until(lambda: cluster.sql("postgres", waiting) == [(1,)], what="a commit that waits", seconds=120)
            told = len(writes.acknowledged)
            assert len(writes.attempted) == told + 1
        writes.wait(5)
    assert writes.lost(cluster.sql("postgres", "SELECT id FROM writes")) == set()


def test_who_is_crashed_stays_dead_and_who_is_shot_comes_back(cluster: Cluster) -> None:
    def state(role: str) -> str:
        return cluster.supervisor.services()[PROGRAMS[role]].state

    before = cluster.supervisor.services()[PROGRAMS["postgres"]].pid
    cluster.shoot("postgres")

    def restarted() -> bool:
        return cluster.supervisor.services()[PROGRAMS["postgres"]].pid not in (0, before)

    until(restarted, what="the restart by the supervisor", seconds=120)
    cluster.start("postgres")
    cluster.crash("postgres")
    assert state("postgres") == "STOPPED"
    with pytest.raises(psycopg.OperationalError):
        cluster.sql("postgres", "SELECT 1")
    assert not (cluster.environment.services.is_running("postgres"))
    cluster.start("postgres")
    assert cluster.sql("postgres", "SELECT 1") == [(1,)]


def test_a_frozen_primary_answers_nobody_until_it_goes_on(cluster: Cluster) -> None:
    with cluster.frozen("postgres"):
        with pytest.raises(psycopg.OperationalError):
            cluster.connect("postgres", seconds=5)
        assert cluster.supervisor.services()[PROGRAMS["postgres"]].running
    assert cluster.sql("postgres", "SELECT 1") == [(1,)]


def test_another_cluster_is_another_system(cluster: Cluster, cluster_template: Template) -> None:
    with running_cluster(cluster_template, fresh=True) as other:
        assert other.node("postgres").system != cluster.node("postgres").system
    with running_cluster(cluster_template) as twin:
        assert twin.node("postgres").system == cluster.node("postgres").system


def test_nothing_is_left_of_a_cluster(cluster_template: Template) -> None:
    with running_cluster(cluster_template) as cluster:
        lived = cluster.processes()
        assert {"postgres", "pg_receivewal"} <= set(map(name_of, lived))
        cluster.crash("receiver")
        root, frozen = cluster.layout.base, cluster._frozen_processes("standby")
        assert frozen
    assert [process for process in lived if lives(process)] == []
    assert not Path(root).exists()


def name_of(process: psutil.Process) -> str:
    """Of one that lives: none of one that ends meanwhile, as a session's does some time after its client has left."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() if lives(process) else ""
    return ""


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
