"""Failovers killed -9 at their steps and launched again; and many of them, with not one acknowledged write lost."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from runbook.errors import OpsError
from runbook.wait import until
from tasks.failover.member import ask_member, control_of
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, PROGRAMS, Cluster, Template, running_cluster
from tests.recovery.postgres_failovers import fail_over, found, lost, process, rejoin, verify_turned

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
REJOIN = ("after stop_services", "rejoin: before pg_rewind", "rejoin: rewound", "before start_services")
ROLES = ("postgres", "standby")


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


def test_a_rejoin_killed_and_its_host_rebooted_leaves_one_primary_and_is_launched_again(cluster: Cluster) -> None:
    """One after the other, the roles turned each time."""
    with cluster.writing() as writes:
        for number, place in enumerate(REJOIN):
            old, new = ROLES[number % 2], ROLES[1 - number % 2]
            writes.wait(20)
            cluster.crash(old)
            fail_over("unplanned")
            writes.wait(20)
            killed("rejoin", place)
            reboot(cluster, old)
            assert not cluster.is_standby(new), place
            assert cluster.environment.postgres.service == new, place
            rejoin()
            until(lambda new=new: cluster.streaming(new) >= {"standby", "receiver"}, what="both", seconds=120)  # type: ignore[misc]
            acknowledged = set(writes.acknowledged)  # they go on
            assert acknowledged - {row[0] for row in found(cluster, new)} == set(), place
    assert not list(cluster.node("postgres").data.parent.glob("*.rewinding"))


def reboot(cluster: Cluster, role: str) -> None:
    """Its service is started, as at the start of its host: it does not run, or it is a standby."""
    postgres = next(node for node in cluster.environment.nodes() if node.service == role)

    standby = Path(postgres.data_directory, "standby.signal")

    def decided() -> bool:
        """Whether its supervisor has seen it fail, it replays as a standby, or it answers."""
        control = control_of(postgres)
        return (
            cluster.supervisor.services()[PROGRAMS[role]].state in ("BACKOFF", "FATAL")
            or (standby.exists() and control is not None and control.state == "in archive recovery")
            or not ask_member(postgres).problem
        )

    with contextlib.suppress(OpsError):  # it ends at once, for instance without its data directory
        cluster.supervisor.start(PROGRAMS[role])
    until(decided, what=f"what {role} becomes", seconds=120)
    assert not ask_member(postgres).is_primary


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
                    reboot(cluster, "postgres")
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


def test_a_planned_one_that_is_cancelled_gives_back_the_primary(cluster: Cluster) -> None:
    """It stopped a primary that took writes."""
    with cluster.writing() as writes:
        writes.wait(20)
        words = ("postgres-failover", f"environment={NAME}", "mode=planned", f"confirm={NAME}")
        place = {"OPS_FAILPOINT": "failover: old primary stopped:cancel", "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        done = forked.run(["-m", "flows.launch", *words], {**os.environ, **place})
        assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
        writes.wait(20)
        assert not cluster.is_standby("postgres")
        assert cluster.is_standby("standby")
        assert not (cluster.root / "reports" / "postgres-failover.json").exists()
        fail_over("planned")
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()
