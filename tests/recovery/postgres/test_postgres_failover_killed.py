"""Failovers killed -9 at their steps and launched again; and many of them, with not one acknowledged write lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from runbook.errors import OpsError
from runbook.wait import until
from tasks.failover.member import ask_member, control_of
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, PROGRAMS, Cluster, Template, running_cluster
from tests.fixtures.reports import rows
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
        plan = postgres_failover.fn(NAME)
        assert "rejoin" in [step.step for step in plan.plan_steps], "it is planned, and carried out"
        fail_over("planned", **plan.pins)
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
        cancelled("postgres-failover", "mode=planned", place="failover: old primary stopped")
        writes.wait(20)
        assert not cluster.is_standby("postgres")
        assert cluster.is_standby("standby")
        assert not (cluster.root / "reports" / "postgres-failover.json").exists()
        fail_over("planned")
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()


def test_an_unplanned_one_that_is_cancelled_leaves_the_dead_primary_as_it_was(cluster: Cluster) -> None:
    """Started again it is the primary, and the report says so."""
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        cancelled("postgres-failover", "mode=unplanned", place="failover: before feeding")
        assert not (cluster.root / "reports" / "postgres-failover.json").exists()
        assert not (cluster.node("postgres").data / "standby.signal").exists()
        found = ended(cluster)
        assert "is the primary when it is started" in found["state of the system"]
        assert found["left behind"] == "nothing"
        cluster.start("postgres")
        writes.wait(20)
        until(lambda: "receiver" in cluster.streaming(), what="the WAL receiver", seconds=120)
        assert not cluster.is_standby("postgres")
    assert lost(cluster, "postgres", writes) == set()


def test_a_rejoin_that_is_cancelled_before_it_replaces_anything_starts_the_standby_again(cluster: Cluster) -> None:
    """It ran, and did not stream."""
    cluster.sql("standby", "ALTER SYSTEM SET primary_conninfo = ''")
    cluster.sql("standby", "SELECT pg_reload_conf()")
    until(lambda: "standby" not in cluster.streaming(), what="the end of its stream", seconds=120)
    cancelled("rejoin-standby", place="after stop_services")
    assert cluster.supervisor.services()[PROGRAMS["standby"]].running
    found = ended(cluster)
    assert "nothing of 127.0.0.1" in found["state of the system"]
    assert found["left behind"] == "nothing"
    rejoin()
    assert "standby" in cluster.streaming()


def cancelled(flow: str, *words: str, place: str) -> None:
    """It is cancelled at that place."""
    variables = {"OPS_FAILPOINT": f"{place}:cancel", "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    given = ("-m", "flows.launch", flow, f"environment={NAME}", f"confirm={NAME}", *words)
    done = forked.run(list(given), {**os.environ, **variables})
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr


def ended(cluster: Cluster) -> dict[str, str]:
    """The findings of the newest report."""
    newest = max((cluster.root / "reports").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {one["name"]: one["value"] for one in json.loads(newest.read_text())["findings"]}


@pytest.mark.parametrize("place", ["before commit_together", "after commit_together"])
def test_a_rejoin_killed_after_it_streams_is_finished_by_the_next_one(cluster: Cluster, place: str) -> None:
    """Commits waited for no standby meanwhile; the WAL receiver is stopped."""
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        with cluster.gone(cluster.layout.pgpass):
            fail_over("unplanned")
        killed("rejoin", place)
        cluster.stop("receiver")
        plan = rejoin_standby.fn(NAME)
        assert [step.step for step in plan.plan_steps] == ["reattach"]
        ((unfinished, *_),) = rows(plan, "Unfinished")[:1]
        assert "the WAL receiver does not stream" in unfinished
        report = rejoin(**plan.pins)
        assert "the unfinished steps are done" in report.outcome
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert cluster.sql("standby", "SHOW synchronous_standby_names") == [("ANY 1 (standby, receiver)",)]
    assert lost(cluster, "standby", writes) == set()
    assert "nothing to do" in rejoin().outcome
