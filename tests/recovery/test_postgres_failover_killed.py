"""Failovers killed -9 at their steps and launched again; and many of them, with not one acknowledged write lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from runbook.wait import until
from tests.clusters import Cluster, Template, running_cluster
from tests.recovery.postgres_failovers import fail_over, lost, process, rejoin, verify_turned

# Around every irreversible step; `soak` takes all that there are.
PLANNED = (
    "failover: remembered",
    "failover: old primary stopped",
    "after keep_down",
    "failover: before pg_promote",
    "failover: promoted",
    "before start_receiver",
    "env file: before rename",
    "rejoin: before pg_rewind",
    "rejoin: rewound",
)
UNPLANNED = ("failover: remembered", "after keep_down", "failover: before feeding", "failover: promoted")
REJOIN = ("after save_diverged", "rejoin: before pg_rewind", "rejoin: rewound", "before start_services")


def killed(what: str, place: str) -> None:
    """It dies at that place, and nowhere else."""
    done = process(what, OPS_FAILPOINT=place)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.parametrize("place", PLANNED)
def test_a_planned_one_killed_is_launched_again_and_ends_well(cluster: Cluster, place: str) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        killed("planned", place)
        fail_over("planned")
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()
    assert not (cluster.root / "reports" / "postgres-failover.json").exists()


@pytest.mark.parametrize("place", UNPLANNED)
def test_an_unplanned_one_killed_is_launched_again_and_ends_well(cluster: Cluster, place: str) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        killed("unplanned", place)
        fail_over("unplanned")
        writes.wait(20)
    verify_turned(cluster, joined=False)
    assert lost(cluster, "standby", writes) == set()


@pytest.mark.parametrize("place", REJOIN)
def test_a_rejoin_killed_is_launched_again_and_ends_well(cluster: Cluster, place: str) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        fail_over("unplanned")
        writes.wait(20)
        killed("rejoin", place)
        rejoin()
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()


@pytest.mark.soak
@pytest.mark.parametrize("what", ["planned", "unplanned", "rejoin"])
def test_killed_at_every_single_place(
    cluster_template: Template, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """Every failpoint that a whole run passes, one cluster for each."""
    log = tmp_path / "places"
    with running_cluster(cluster_template) as cluster:
        _name(cluster, monkeypatch)
        _break(cluster, what)
        assert process(what, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    for place in dict.fromkeys(log.read_text().splitlines()):
        with running_cluster(cluster_template) as cluster:
            _name(cluster, monkeypatch)
            with cluster.writing() as writes:
                writes.wait(20)
                _break(cluster, what)
                killed(what, place)
                if what == "rejoin":
                    rejoin()
                else:
                    fail_over(what)
                writes.wait(20)
            verify_turned(cluster, joined=what != "unplanned")
            assert lost(cluster, "standby", writes) == set(), place


def _name(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)


def _break(cluster: Cluster, what: str) -> None:
    """Before it: for each but a planned one the primary is dead; for a rejoin its standby is the primary."""
    if what != "planned":
        cluster.crash("postgres")
    if what == "rejoin":
        fail_over("unplanned")


def many(cluster: Cluster, times: int, mode: str) -> None:
    """There and back, so many times: after each, every write that was ever acknowledged is there."""
    roles = ("postgres", "standby")
    with cluster.writing() as writes:
        for run in range(times):
            old, new = roles[run % 2], roles[1 - run % 2]
            writes.wait(100)
            if mode == "unplanned":
                cluster.crash(old)
            report = fail_over(mode)
            writes.wait(20)
            acknowledged = set(writes.acknowledged)
            there = {row[0] for row in cluster.sql(new, "SELECT id FROM writes")}
            assert acknowledged - there == set(), f"run {run + 1}: {report.facts}"
            assert report.facts["acknowledged writes lost"].startswith("0"), report.facts
            if mode == "unplanned":
                rejoin()
            until(lambda new=new: cluster.streaming(new) >= {"standby", "receiver"}, what="both", seconds=120)  # type: ignore[misc]
            phases = ("decision", "fencing", "replay of the tail", "promote", "first acknowledged write")
            print(run + 1, mode, len(writes.acknowledged), *(report.facts[name] for name in phases))


@pytest.mark.parametrize("mode", ["planned", "unplanned"])
def test_no_acknowledged_write_is_lost_in_3_runs(cluster: Cluster, mode: str) -> None:
    many(cluster, 3, mode)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["planned", "unplanned"])
def test_no_acknowledged_write_is_lost_in_20_runs(cluster: Cluster, mode: str) -> None:
    many(cluster, 20, mode)
