"""PostgreSQL failover, planned and unplanned, against real clusters: clients write all the time, and their own account
of what was acknowledged is compared with what the new primary has."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.recovery.postgres import pair
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from lab.processes import OsAccount
from lab.servers.supervision import Program
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.failover import member
from tests.fixtures.postgres.clusters import NAME, Cluster, Template, running_cluster
from tests.fixtures.reports import text_of as finding
from tests.recovery.postgres_failovers import address, fail_over, found, lost, refused, rejoin, target, verify_turned

ALERTS = """
[alerts]
channels = ["file"]
file = "{}/alerts.jsonl"
path = [{{ contacts = ["yamada"] }}]
[alerts.contacts.yamada]
role = "SRE"
name = "山田"
"""


def test_a_crashed_primary_is_replaced_nothing_is_lost_and_it_follows_again(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(200)
        cluster.crash("postgres")
        report = fail_over("unplanned")
        assert report.status is Status.WARN, report.sentence()
        writes.wait(50)
        verify_turned(cluster, joined=False)
        plan = rejoin_standby.fn(NAME)
        assert plan.status is Status.PLANNED
        assert "pg_rewind" in str([step.detail for step in plan.plan_steps])
        verify_turned(cluster, joined=False)
        again = rejoin()
        assert again.status is Status.OK, again.sentence()
        writes.wait(50)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()
    assert report.facts["acknowledged writes lost"].startswith("0")
    for phase in ("decision", "fencing", "promote", "first acknowledged write"):
        assert re.fullmatch(r"\d+\.\d{3} s", report.facts[phase]), phase
    assert "nothing to do" in rejoin().outcome


def test_with_the_standby_the_programs_that_receive_and_ship_wal_start(cluster_template: Template) -> None:
    """As after a region failover from a dump, which brings neither up."""
    archiver = Program("archiver", ("sleep", "3600"), Path("/"), autostart=False)
    with running_cluster(cluster_template, programs=[archiver]) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.variables.items():
            patch.setenv(name, value)
        for role in ("standby", "receiver"):
            cluster.stop(role)
        assert not cluster.supervisor.services()["archiver"].running
        report = rejoin()
        assert cluster.supervisor.services()["archiver"].running, report.sentence()
        until(lambda: cluster.streaming() == {"standby", "receiver"}, what="both", seconds=120)
        cluster.supervisor.stop("archiver")


def test_an_archiver_that_does_not_start_leaves_a_standby_that_streams_and_the_report_says_so(
    cluster_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    archiver = Program("archiver", ("false",), Path("/"), autostart=False)
    with running_cluster(cluster_template, programs=[archiver]) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        cluster.stop("standby")
        with pytest.raises(RunbookFailed, match="archiver does not start") as caught:
            rejoin()
        state = finding(caught.value.report, "state of the system")
        assert f"{address(cluster, 'standby')} streams from {address(cluster, 'postgres')}" in state
        assert "no standby yet" not in state
        assert "standby" in cluster.streaming()


def test_a_standby_that_has_not_noticed_the_death_yet_is_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is streamed to, as by a primary that lives."""
    monkeypatch.setattr(pair, "SILENT_SECONDS", 120.0)
    ((pid,),) = cluster.sql("standby", "SELECT pid FROM pg_stat_wal_receiver")
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as beside:
        crash = beside.submit(cluster.crash, "postgres")
        until(lambda: not cluster.environment.services.is_running("postgres"), what="the death", seconds=120)
        threading.Timer(2, os.kill, (pid, signal.SIGCONT)).start()
        assert fail_over("unplanned").facts["acknowledged writes lost"].startswith("0")
        crash.result()


def test_a_planned_switchover_loses_nothing_and_the_old_primary_follows_there_and_back(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(100)
        report = fail_over(new_primary=address(cluster, "standby"))
        writes.wait(50)
        verify_turned(cluster, joined=True)
        assert report.facts["acknowledged writes lost"].startswith("0 (proven")
        assert [measure.what for measure in report.measures] == ["database standby"]
        again = fail_over(new_primary=address(cluster, "standby"))
        assert "nothing to do" in again.outcome
        assert fail_over().status is Status.WARN
        writes.wait(50)
    assert cluster.is_standby("standby")
    assert target(cluster) == address(cluster, "postgres")
    assert lost(cluster, "postgres", writes) == set()


@pytest.mark.parametrize("mode", ["planned", "unplanned"])
def test_without_confirm_it_plans_and_changes_nothing(cluster: Cluster, mode: str) -> None:
    if mode == "unplanned":
        cluster.crash("postgres")
    before = {name: service.pid for name, service in cluster.supervisor.services().items()}
    report = postgres_failover.fn(NAME, mode=mode)
    assert report.status is Status.PLANNED, report.sentence()
    assert report.facts["from → to"] == f"{address(cluster, 'postgres')} → {address(cluster, 'standby')}"
    assert report.pins["new_primary"] == address(cluster, "standby")
    assert {name: service.pid for name, service in cluster.supervisor.services().items()} == before
    assert cluster.is_standby("standby")
    assert target(cluster) == address(cluster, "postgres")
    assert not (cluster.node("postgres").data / "standby.signal").exists()


def test_writes_that_only_the_receiver_has_are_replayed_by_a_standby_that_does_not_ask_for_them(
    cluster: Cluster,
) -> None:
    """Its restore_command reads nothing of the receiver's; it is given one for the time of the failover."""
    cluster.sql("standby", "ALTER SYSTEM SET restore_command = 'false'")
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.stop("standby")
        writes.wait(100)
        cluster.crash("postgres")
        cluster.start("standby")
        report = fail_over("unplanned")
        writes.wait(20)
    assert report.facts["acknowledged writes lost"].startswith("0")
    assert lost(cluster, "standby", writes) == set()
    until(lambda: cluster.sql("standby", "SHOW restore_command") == [("false",)], what="the reload", seconds=120)


def test_with_neither_standby_nor_receiver_commits_wait_for_nobody_and_the_report_says_so(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        with cluster.gone(cluster.layout.pgpass):
            report = fail_over("unplanned")
            writes.wait(20)
        assert "overridden" in finding(report, "commits wait for no standby")
        assert "wait for no standby" in report.facts["commits on the new primary"]
        assert rejoin().status is Status.OK
        writes.wait(20)
    assert cluster.sql("standby", "SHOW synchronous_standby_names") == [("ANY 1 (standby, receiver)",)]
    assert lost(cluster, "standby", writes) == set()
    verify_turned(cluster, joined=True)


def test_asynchronous_what_only_the_dead_primary_has_is_replayed_first(
    cluster_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, and then shut down in good order, with the receiver stopped and the standby behind: 0 are lost."""
    with running_cluster(cluster_template, settings=["synchronous_standby_names = ''"]) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        with cluster.writing() as writes:
            for old, new, end in (("postgres", "standby", cluster.crash), ("standby", "postgres", cluster.stop)):
                writes.wait(20)
                cluster.stop(new, "receiver")
                writes.wait(100)
                end(old)
                acknowledged = set(writes.acknowledged)
                cluster.start(new)
                report = fail_over("unplanned", max_lag_megabytes=0)
                assert acknowledged - {row[0] for row in found(cluster, new)} == set()
                assert report.facts["acknowledged writes lost"].startswith("0 (proven")
                assert "WAL that only the old primary has" in report.facts
                assert not list(cluster.node(new).data.parent.glob("*.feed"))
                rejoin()


@pytest.mark.parametrize("method", ["auto", "base_backup"])
def test_asynchronous_what_is_lost_is_counted_and_kept(
    cluster_template: Template, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The dead primary's files cannot be read during the failover, and are back before it is joined again."""
    with running_cluster(cluster_template, settings=["synchronous_standby_names = ''"]) as cluster:
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        with cluster.writing() as writes:
            writes.wait(20)
            cluster.stop("standby", "receiver")
            writes.wait(100)
            cluster.crash("postgres")
            acknowledged = set(writes.acknowledged)
            cluster.start("standby")
            with cluster.gone(cluster.node("postgres").data):
                report = fail_over("unplanned")
            writes.wait(20)
            really = acknowledged - {row[0] for row in found(cluster, "standby")}
            assert len(really) >= 100
            assert report.facts["acknowledged writes lost"] == "unknown"
            assert report.status is Status.WARN
            again = rejoin(method=method)
            match = re.search(r"with ([\d,]+) transactions", again.facts["diverged WAL"])
            assert match, again.facts["diverged WAL"]
            counted = int(match[1].replace(",", ""))
            assert len(really) <= counted <= len(really) + 2, "one session's commit may not have been answered"
            assert method in again.facts["joined by"] or method == "auto"
            writes.wait(20)
        verify_turned(cluster, joined=True)


def test_a_rewind_that_cannot_be_becomes_a_base_backup(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        fail_over("unplanned")
        writes.wait(20)
        (cluster.node("postgres").data / "global" / "pg_control").rename(cluster.root / "pg_control")
        with pytest.raises(RunbookFailed, match="base_backup"):
            rejoin(method="rewind")
        report = rejoin()
        assert report.facts["joined by"].startswith("base_backup")
        assert "superseded" in report.facts["joined by"]
        writes.wait(20)
    verify_turned(cluster, joined=True)
    assert lost(cluster, "standby", writes) == set()


def test_a_standby_that_was_promoted_by_hand_is_finished(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        cluster.promote("standby")
        cluster.stop("receiver")
        report = fail_over("unplanned")
        assert "nothing to promote" in report.outcome
        assert (cluster.node("postgres").data / "standby.signal").exists()
        writes.wait(20)
    assert target(cluster) == address(cluster, "standby")
    assert "receiver" in cluster.streaming("standby")
    assert "nothing to do" in fail_over("unplanned").outcome
    assert lost(cluster, "standby", writes) == set()


def test_an_attested_fence_is_told_apart_from_a_proven_one(cluster: Cluster) -> None:
    file = cluster.root / "pair.toml"
    port = cluster.state.ports.supervisor
    cluster.crash("postgres")
    file.write_text(file.read_text().replace(f":{port}", ":9"))
    report = refused("unplanned")
    assert "does not answer" in finding(report, "its supervisor does not run or restart it")
    with pytest.raises(OpsError, match="has no people configured"):
        fail_over("unplanned", fenced_by="山田 iDRACで電源断")
    file.write_text(file.read_text() + ALERTS.format(cluster.root))
    with pytest.raises(OpsError, match=r"“yes” does not begin with .*\(山田\)"):
        fail_over("unplanned", fenced_by="yes")
    report = fail_over("unplanned", fenced_by="山田 iDRACで電源断")
    told = finding(report, "fence, attested and not proven")
    assert told.startswith("WARN")
    assert "山田" in told
    assert "its port is closed" in finding(report, "fence, proven")
    assert not cluster.is_standby("standby")


def test_without_what_the_receiver_had_it_says_what_it_does_not_know(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is gone, and so are the dead primary's files: nobody can say that nothing is lost."""
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.crash("postgres")
        with cluster.gone(cluster.wal), cluster.gone(cluster.node("postgres").data):
            report = fail_over("unplanned")
            assert "cannot be compared" in finding(report, "the WAL receiver")
            assert "not measured" in finding(report, "lag of the standby")
            assert report.facts["acknowledged writes lost"] == "unknown"
    assert not cluster.is_standby("standby")


def test_a_receiver_that_is_behind_takes_nothing_from_the_standby(cluster: Cluster) -> None:
    """Its segment is shorter than the standby's own: restored over that, the last acknowledged writes would be gone."""
    with cluster.writing() as writes:
        writes.wait(20)
        cluster.stop("receiver")
        writes.wait(200)
        cluster.crash("postgres")
        fail_over("unplanned")
        writes.wait(20)
    assert lost(cluster, "standby", writes) == set()


@pytest.mark.parametrize("mode", ["planned", "unplanned"])
def test_a_setting_and_a_slot_that_the_standby_lacks_are_named(
    cluster: Cluster, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.sql("postgres", "SELECT pg_create_physical_replication_slot('consumer', true)")
    changed = (("postgres", "work_mem", "6MB"), ("postgres", "timezone", "Asia/Tokyo"), ("postgres", "jit", "off"))
    for server, name, value in (*changed, ("standby", "jit", "off"), ("standby", "timezone", "UTC")):
        cluster.sql(server, f"ALTER SYSTEM SET {name} = '{value}'")
        cluster.sql(server, "SELECT pg_reload_conf()")
    if mode == "unplanned":
        cluster.crash("postgres")
    else:  # nobody needs the files of a server that answers: they may be on another host
        monkeypatch.setattr(member, "_altered_in", lambda _: [])
    report = postgres_failover.fn(NAME, mode=mode)
    assert report.status is Status.PLANNED, report.sentence()
    named = [one for one in report.findings if one.name.startswith("the setting ")]
    assert [one.name for one in named] == ["the setting TimeZone", "the setting work_mem"]
    assert named[1].value.startswith("6144 → 4096: ")
    assert finding(report, "replication slots").startswith("WARN consumer (physical)")


def test_a_standby_on_the_primarys_host_gets_its_own_directories_of_tablespaces(cluster: Cluster) -> None:
    """pg_basebackup would use the primary's paths, which are not empty."""
    place = cluster.root / "space"
    place.mkdir()
    account = OsAccount.of_servers()
    os.chown(place, account.uid, account.gid)
    cluster.stop("standby")
    cluster.sql("postgres", f"CREATE TABLESPACE extra LOCATION '{place}'")
    cluster.sql("postgres", "CREATE TABLE spaced TABLESPACE extra AS SELECT generate_series(1, 100) AS id")
    plan = rejoin_standby.fn(NAME, method="base_backup")
    assert str(place) in finding(plan, "tablespaces of the standby")
    assert rejoin(method="base_backup").status is Status.WARN
    until(lambda: cluster.sql("standby", "SELECT count(*) FROM spaced") == [(100,)], what="its rows", seconds=60)
    assert cluster.sql("postgres", "SELECT count(*) FROM spaced") == [(100,)]
