"""Redis failovers in which something is slow, half done or cut off: what is acknowledged stays, or is told as lost."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from blocks.environment import Environment
from blocks.redis.server import Redis
from runbook.files import record
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.failover import handover
from tasks.redis.failover.promotion import PromotionChoice
from tasks.redis.server import call
from tasks.redis.topology.topology import RECORD, ReplicationTopology
from tests.fixtures import forked
from tests.fixtures.reports import text_of as finding
from tests.recovery.redis.test_redis_failover import (
    end,
    fail_over,
    follows,
    leftovers,
    process,
    refused,
    wait_until_stopped,
)
from tests.redis.servers import (
    MASTER,
    NAME,
    PASSWORD,
    TIMEOUT_MS,
    Group,
    RedisServer,
    be_patient,
    notice_deaths,
    replicated,
)
from tests.redis.writer import Writer


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Group]:
    """A master, replicas (one, or as many as the parameter says) and three Sentinels, as the environment NAME."""
    be_patient(monkeypatch)
    with replicated(replicas=getattr(request, "param", 1)) as found:
        found.register(monkeypatch)
        yield found


def standing_behind(master: RedisServer, command: str) -> int:
    """How many clients' commands of that name the pause of writes holds up."""
    return sum(found["cmd"] == command and "b" in found["flags"] for found in master.client().client_list())


@pytest.mark.parametrize("group", [1, 2], indirect=True)
def test_sentinels_whose_greeting_stands_behind_the_pause_hand_over_all_the_same(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each greets by PUBLISH every two seconds, on the connection by which it would ask the master to hand over."""
    catch_up, all_of_them = handover._catch_up, len(group.sentinels)

    def late(block: Redis, choice: PromotionChoice) -> int:
        stood = catch_up(block, choice)
        until(lambda: standing_behind(group.master, "publish") >= all_of_them, what="their greetings", seconds=120)
        return stood

    monkeypatch.setattr(handover, "_catch_up", late)
    with Writer(group) as writer:
        report = fail_over()
        writer.wait(20)
    new = group.at(group.agreed_master())
    assert new in group.replicas
    assert report.facts["master"].endswith("coordinated")
    assert writer.lost(new) == set()
    wait_until_it_follows(group.master, new)


def wait_until_it_follows(server: RedisServer, master: RedisServer) -> None:
    """Within the Sentinels' own time; they end clients' connections meanwhile."""

    def ready() -> bool:
        try:
            return follows(server, master)
        except redis.ConnectionError:
            return False

    until(ready, what="the other server as a replica", seconds=120)


@contextlib.contextmanager
def standing_still(group: Group, log: Path, **named: float) -> Iterator[forked.Child]:
    """A run whose replica stops just before the Sentinels are asked to promote it: they would do that within moments."""
    child = process("planned", "forced", OPS_FAILPOINT="failover: held:pause", OPS_FAILPOINT_LOG=str(log), **named)  # type: ignore[arg-type]
    wait_until_stopped(child)
    group.replicas[0].freeze()
    child.send_signal(signal.SIGCONT)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("wakes", [True, False])
def test_a_replica_that_stands_still_when_it_is_promoted(group: Group, tmp_path: Path, wakes: bool) -> None:
    reached = tmp_path / "reached"
    if not wakes:
        for sentinel in group.sentinels:
            call(sentinel.client(), "SENTINEL", "SET", MASTER, "failover-timeout", TIMEOUT_MS)
    replica = group.replicas[0]
    with Writer(group) as writer, standing_still(group, reached, answer_seconds=5.0) as child:
        until(
            lambda: "failover: late" in reached.read_text() or child.poll() is not None,
            what="the end of the usual time",
            seconds=120,
        )
        if wakes:
            replica.thaw()
        said = end(child)
        writer.wait(50)  # they go on
        replica.thaw()
        new = group.wait_for_master_other_than(group.master) if wakes else group.master
        writer.wait(50)
    assert writer.lost(new) == set(), said
    assert child.returncode == (0 if wakes else 1), said
    assert wakes or "aborted their failover" in said
    assert wakes or "writes continue" in said
    other = replica if new is group.master else group.master
    wait_until_it_follows(other, new)
    assert group.agreed_master() == new.address


def test_what_a_killed_run_has_lost_is_told_by_the_next(group: Group, tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    replica = group.replicas[0]
    with Writer(group) as writer:
        with standing_still(group, reached) as child:
            until(
                lambda: "failover: begun" in reached.read_text() or child.poll() is not None,
                what="a failover that was begun",
                seconds=120,
            )
        call(group.master.client(), "CLIENT", "KILL", "TYPE", "replica")  # else it might read on before it is promoted
        writer.wait(50)  # the pause has ended by itself
        replica.thaw()
        group.wait_for_master_other_than(group.master)
        wait_until_it_follows(group.master, replica)
        report = fail_over()
        writer.wait(20)
    assert writer.lost(replica)
    assert report.status is Status.WARN
    assert finding(report, "acknowledged writes lost, at most")


def test_that_a_killed_run_has_lost_nothing_is_proven_by_the_next(group: Group) -> None:
    child = process("planned", OPS_FAILPOINT="failover: agreed")  # handed over: the old one follows in the same stream
    child.communicate(timeout=300)
    new = group.wait_for_master_other_than(group.master)
    wait_until_it_follows(group.master, new)
    report = fail_over()
    assert report.status is Status.OK, report.sentence()
    assert report.facts["acknowledged writes lost"].startswith("0 (proven)")


@pytest.mark.parametrize("group", [2], indirect=True)
def test_another_new_master_is_not_taken_for_what_a_killed_run_has_done(group: Group) -> None:
    for server in group.replicas:
        server.client().config_set("replica-priority", 200)  # whoever is not master is to be turned to the old one
    child = process(OPS_FAILPOINT="failover: agreed")
    child.communicate(timeout=300)
    wait_until_it_follows(group.master, group.wait_for_master_other_than(group.master))

    def known() -> bool:
        told = [found for sentinel in group.sentinels for found in sentinel.client().sentinel_slaves(MASTER)]
        mine = [found for found in told if found["port"] == group.master.port]
        return len(mine) == 3 and all(found["master-link-status"] == "ok" for found in mine)

    until(known, what="the old master as a replica that the Sentinels know", seconds=120)
    report = fail_over(new_master=group.master.address)
    assert report.status is Status.OK, report.sentence()
    assert group.agreed_master() == group.master.address
    assert b"ops-failover:begun" not in leftovers(group)


def test_the_sentinels_promote_between_judgement_and_take_over(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    allow, replica = Report.allow, group.replicas[0]

    def priorities() -> set[int]:
        told = [found for sentinel in group.sentinels for found in sentinel.client().sentinel_slaves(MASTER)]
        return {int(found["slave-priority"]) for found in told}

    replica.client().config_set("replica-priority", 0)
    until(lambda: priorities() == {0}, what="the Sentinels' next INFO", seconds=120)
    group.master.crash()
    # After one failover that comes to nothing they wait for long, so that it is known.
    notice_deaths(group.sentinels, timeout_ms=60_000)
    refused("unplanned")
    replica.client().config_set("replica-priority", 100)
    until(lambda: priorities() == {100}, what="the Sentinels' next INFO", seconds=120)

    def meanwhile(self: Report, *acts: Any, **effect: Any) -> None:
        allow(self, *acts, **effect)
        group.promote()

    monkeypatch.setattr(Report, "allow", meanwhile)
    report = fail_over("unplanned")
    assert report.status is Status.WARN
    assert report.outcome.startswith(f"{replica.address} is the master")
    assert report.facts["master"].endswith("by the Sentinels themselves")


def test_the_loss_of_a_replica_whose_link_was_down_is_bounded(group: Group) -> None:
    replica = group.replicas[0].client()
    with Writer(group) as writer:
        writer.wait(200)
        replica.config_set("masterauth", "wrong")
        call(group.master.client(), "CLIENT", "KILL", "TYPE", "replica")
        until(lambda: replica.info("replication")["master_link_status"] == "down", what="the link's end", seconds=120)
        cut = time.monotonic()
        writer.wait(200)

        def read_since() -> bool:
            ages = [found.client().sentinel_master(MASTER)["info-refresh"] / 1000 for found in group.sentinels]
            return max(ages) + 0.5 < time.monotonic() - cut

        until(read_since, what="the Sentinels' next INFO", seconds=120)
        group.master.crash()
        notice_deaths(group.sentinels)
        report = fail_over("unplanned")
    lost = writer.lost(group.at(group.agreed_master()))
    assert lost
    assert "bytes of the stream" in finding(report, "certainly lost")
    assert len(lost) <= int(report.facts["acknowledged writes lost, at most, at the last known load"].replace(",", ""))


def test_a_burst_that_nobody_saw_is_not_said_to_be_bounded(group: Group) -> None:
    def fresh() -> bool:
        told = [found.client().sentinel_master(MASTER)["info-refresh"] for found in group.sentinels]
        return max(told) < 4000

    until(fresh, what="the Sentinels' INFO of an idle master", seconds=120)
    replica = group.replicas[0]
    replica.freeze()
    with group.master.client().pipeline(transaction=False) as pipe:
        for number in range(5000):
            pipe.set(f"burst:{number}", number)
        pipe.execute()
    group.master.crash()
    replica.thaw()
    notice_deaths(group.sentinels)
    report = fail_over("unplanned")
    assert "not bounded" in finding(report, "acknowledged writes that may be lost")


@pytest.mark.parametrize("missing", ["smembers", "sadd", "unlink"])
def test_rights_are_asked_of_the_replica_too(group: Group, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for server in group.servers:
        rights = ["+@all"] if server is group.master else ["+@all", f"-{missing}"]
        server.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=rights)
    group.register(monkeypatch, extra='username = "ops"\n')
    report = refused()
    assert f"the command {missing.upper()}" in finding(report, f"rights on {group.replicas[0].address}")
    assert group.agreed_master() == group.master.address


def test_sentinels_that_a_restore_took_off_are_put_back_by_reattach(group: Group) -> None:
    master, replica = group.master.address, group.replicas[0].address
    noted = ReplicationTopology(master, master, (replica,), since="2026-01-01T00:00:00+00:00")
    record.write(Environment.find(NAME).reports_directory / RECORD, noted)
    for sentinel in group.sentinels:
        call(sentinel.client(), "SENTINEL", "REMOVE", MASTER)
    report = refused()
    assert noted.since in finding(report, "one master in all Sentinels")
    assert "reattach-redis" in report.sentence()
