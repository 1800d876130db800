"""Redis failover, planned and unplanned, against real groups: a client writes all the time, and its own account of what
was acknowledged is compared with what the new master has."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import redis
import redis.sentinel

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.recovery.redis import choice, failover, findings
from flows.recovery.redis.failover import redis_failover
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.failover.group import Group as Group_
from tasks.redis.failover.group import GroupMember
from tasks.redis.sentinels import SentinelView, Watch, ask_sentinels
from tasks.redis.server import call
from tasks.redis.topology import topology
from tests.fixtures import forked
from tests.fixtures.reports import text_of as finding
from tests.redis.servers import (
    ANSWER,
    MASTER,
    NAME,
    PASSWORD,
    PATIENCE_SECONDS,
    Group,
    RedisServer,
    be_patient,
    notice_deaths,
    replicated,
    settles,
)
from tests.redis.writer import Writer

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import sys
import pytest
from flows.recovery.redis import choice as failover_choice
from flows.recovery.redis.failover import redis_failover
from runbook.errors import OpsError
from tests.redis.servers import be_patient
be_patient(pytest.MonkeyPatch(), float(sys.argv[3]))
if sys.argv[4:]:
    failover_choice.coordinates = lambda *_: False
try:
    print(redis_failover.fn(sys.argv[1], mode=sys.argv[2], confirm=sys.argv[1]).sentence())
except OpsError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Group]:
    """A master, replicas (one, or as many as the parameter says) and three Sentinels, as the environment NAME."""
    be_patient(monkeypatch)
    with replicated(replicas=getattr(request, "param", 1)) as found:
        found.register(monkeypatch)
        yield found


@pytest.fixture(params=["as the servers can", "forced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Valkey 9 hands over by itself; the way for all others is taken by it too where it is told to."""
    if request.param == "forced":
        monkeypatch.setattr(choice, "coordinates", lambda *_: False)
    return str(request.param)


def fail_over(mode: Any = "planned", **parameters: Any) -> Report:
    """For real, and well."""
    return redis_failover.fn(NAME, mode=mode, confirm=NAME, **parameters)


def refused(mode: Any = "planned", **parameters: Any) -> Report:
    """The report of a run that must not begin."""
    with pytest.raises(RunbookFailed) as caught:
        redis_failover.fn(NAME, mode=mode, **{"confirm": NAME, **parameters})
    return caught.value.report


def process(
    mode: str = "planned", *words: str, answer_seconds: float = PATIENCE_SECONDS, **variables: str
) -> forked.Child:
    """In a process of its own, without a Prefect server."""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", **variables}
    return forked.launch(["-c", RUN, NAME, mode, str(answer_seconds), *words], environment, merge=True)


def wait_until_stopped(child: forked.Child) -> None:
    """It stands at its failpoint."""
    found = psutil.Process(child.pid)
    until(lambda: found.status() == psutil.STATUS_STOPPED, what="the failpoint", seconds=120)


def end(child: forked.Child) -> str:
    """Let it go on; what it said."""
    child.send_signal(signal.SIGCONT)
    return child.communicate(timeout=300)[0]


def follows(server: RedisServer, master: RedisServer) -> bool:
    """False, too, while it ends its connections because it becomes a replica."""
    try:
        info = server.client().info("replication")
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    return bool(info["role"] == "slave" and info["master_port"] == master.port and info["master_link_status"] == "up")


def takes_writes(server: RedisServer) -> bool:
    """At once: there is no pause that would end by itself."""
    info = server.client().info("clients")
    known = "paused_actions" in info  # since Valkey 8.1
    return info.get("paused_actions", "none") == "none" and bool(
        server.client(socket_timeout=None if known else 5).set("k", "v")
    )


def leftovers(group: Group) -> list[bytes]:
    return [key for server in group.servers if server.is_running for key in server.client().scan_iter("ops-*")]


@pytest.mark.parametrize("group", [1, 2], indirect=True)
def test_a_planned_failover_loses_no_acknowledged_write(
    group: Group, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ops")
    with Writer(group) as writer:
        report = fail_over()
        writer.wait(50)
    new = group.at(group.agreed_master())
    assert report.status is Status.OK, report.sentence()
    assert [measure.what for measure in report.measures] == ["redis replica"]
    done = [line.partition(": done in")[0] for line in caplog.messages if re.match(r"Step .*: done in ", line)]
    assert done == ["Step 1/4: pause writes", "Step 2/4: fail over", "Step 3/4: verify", "Step 4/4: follow"]
    assert new is not group.master
    assert writer.lost(new) == set()
    assert report.facts["acknowledged writes lost"] == "0 (proven)"
    assert all(follows(server, new) for server in group.servers if server is not new)
    settles(lambda: leftovers(group) == [], "the end of what it wrote, on all servers")
    for phase in ("decision", "switch", "first acknowledged write", "switch and first acknowledged write"):
        assert re.fullmatch(r"\d+\.\d{3} s", report.facts[phase])
    # The Sentinels' own account agrees with ours: nobody is down, and nothing is paused.
    assert group.master.client().info("replication")["role"] == "slave"
    assert takes_writes(new)


def test_without_confirm_it_plans_and_changes_nothing(group: Group) -> None:
    before = group.master.client().dbsize()
    report = redis_failover.fn(NAME)
    assert report.status is Status.PLANNED
    assert report.facts["from → to"] == f"{group.master.address} → {group.replicas[0].address}"
    assert report.pins["new_master"] == group.replicas[0].address
    (table,) = [item for item in report.evidence if item.name == "Candidates"]
    assert table.rows[0][1] == group.replicas[0].address
    assert table.rows[0][-1] == "fit"
    assert group.agreed_master() == group.master.address
    assert group.master.client().dbsize() == before


@pytest.mark.parametrize("group", [2], indirect=True)
def test_the_new_master_that_was_asked_for_and_nothing_to_do_afterwards(group: Group) -> None:
    wanted, other = group.replicas
    report = refused(new_master=wanted.address)
    assert "replica-priority" in finding(report, "as requested")
    wanted.client().config_set("replica-priority", 10)

    def seen() -> bool:
        told = [found for sentinel in group.sentinels for found in sentinel.client().sentinel_slaves(MASTER)]
        return all(found["slave-priority"] == 10 for found in told if found["port"] == wanted.port)

    until(seen, what="the Sentinels' next INFO", seconds=120)
    assert fail_over(new_master=wanted.address).status is Status.OK
    assert group.agreed_master() == wanted.address
    again = fail_over(new_master=wanted.address)
    assert again.status is Status.OK
    assert "nothing to do" in again.outcome
    assert group.agreed_master() == wanted.address
    assert follows(other, wanted)


def test_quorum_missing_is_refused(group: Group) -> None:
    for sentinel in group.sentinels[1:]:
        sentinel.crash()
    report = refused()
    assert "CRITICAL 1 answer" in finding(report, "quorum and majority")
    for sentinel in group.sentinels[1:]:
        assert sentinel.address in finding(report, "answering Sentinels")
    assert group.agreed_master() == group.master.address


def test_one_silent_sentinel_is_named_and_not_needed(group: Group) -> None:
    group.sentinels[2].crash()
    report = fail_over()
    assert report.status is Status.WARN
    assert group.sentinels[2].address in finding(report, "answering Sentinels")
    assert group.agreed_master() == group.replicas[0].address


def test_sentinels_that_disagree_are_refused_and_a_restore_waits_for_them(
    group: Group, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, replica = group.sentinels[0].client(), group.replicas[0]
    call(one, "SENTINEL", "REMOVE", MASTER)
    call(one, "SENTINEL", "MONITOR", MASTER, "127.0.0.1", replica.port, 2)
    report = refused()
    told = finding(report, "one master in all Sentinels")
    assert f"{replica.address} by {group.sentinels[0].address}" in told
    assert group.master.address in told
    assert group.master.client().info("replication")["role"] == "master"

    def answer_then_correct(block: Redis) -> Watch:
        """A failover that one Sentinel learns of after the first query."""
        watch = ask_sentinels(block)
        if watch.disagreement:
            call(one, "SENTINEL", "REMOVE", MASTER)
            call(one, "SENTINEL", "MONITOR", MASTER, "127.0.0.1", group.master.port, 2)
        return watch

    monkeypatch.setattr(topology, "ask_sentinels", answer_then_correct)
    found = topology.read_topology.work(Environment.find(NAME).redis, tmp_path)
    assert (found.disagreement, found.master) == ("", group.master.address)


def test_sentinels_that_would_fail_over_again_at_once_are_refused(group: Group) -> None:
    call(group.sentinels[1].client(), "SENTINEL", "SET", MASTER, "down-after-milliseconds", 500)
    report = refused()
    assert f"500 ms at {group.sentinels[1].address}" in finding(report, "down-after-milliseconds")
    assert group.agreed_master() == group.master.address


def _priority(group: Group) -> None:
    group.replicas[0].client().config_set("replica-priority", 0)


def _link(group: Group) -> None:
    group.replicas[0].client().config_set("masterauth", "wrong")
    call(group.master.client(), "CLIENT", "KILL", "TYPE", "replica")
    link = group.replicas[0].client()
    until(lambda: link.info("replication")["master_link_status"] == "down", what="the link's end", seconds=120)


def _frozen(group: Group) -> None:
    group.replicas[0].freeze()


def _crashed(group: Group) -> None:
    group.replicas[0].crash()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_priority, "priority 0"),
        (_link, "its link to the master has been down"),
        (_frozen, "disconnected: .* does not answer"),
        (_crashed, "disconnected: .* does not answer"),
    ],
)
def test_a_replica_that_is_not_fit_is_named_with_its_reason(
    group: Group, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Group], None], why: str
) -> None:
    harm(group)
    monkeypatch.setattr(ANSWER, 10.0 if harm is _frozen else PATIENCE_SECONDS)
    report = refused()
    told = finding(report, "fit replica")
    assert group.replicas[0].address in told
    assert re.search(why, told)
    assert takes_writes(group.master)


@pytest.mark.parametrize("group", [2], indirect=True)
def test_one_fit_replica_is_enough(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, fit = group.replicas
    frozen.freeze()
    monkeypatch.setattr(ANSWER, 5.0)
    for sentinel in group.sentinels:
        call(sentinel.client(), "SENTINEL", "SET", MASTER, "down-after-milliseconds", 10_000)

    def seen() -> bool:
        told = [found for sentinel in group.sentinels for found in sentinel.client().sentinel_slaves(MASTER)]
        return all(found["is_sdown"] for found in told if found["port"] == frozen.port)

    until(seen, what="the Sentinels' verdict", seconds=120)
    report = fail_over()
    assert report.status is Status.WARN
    assert frozen.address in finding(report, "servers that are down")
    assert group.agreed_master() == fit.address


def test_a_wrong_password_is_said(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "no")
    report = refused()
    assert "refuses the password" in finding(report, "the master")
    assert group.agreed_master() == group.master.address


LEAST = (
    *(
        "+ping",
        "+info",
        "+multi",
        "+exec",
        "+discard",
        "+client|pause",
        "+client|unpause",
        "+client|kill",
        "+client|setname",
    ),
    *("+replicaof", "+config|rewrite", "+set", "+get", "+sadd", "+expire", "+smembers", "+unlink"),
)


@pytest.mark.parametrize(
    ("rights", "missing"),
    [
        (("+@all", "-client|pause"), "CLIENT|PAUSE"),
        (("+@all", "-replicaof"), "REPLICAOF"),
        (("+@all", "-info"), "INFO"),
        (("+@all", "-multi"), "MULTI"),
    ],
)
def test_a_user_without_rights_is_refused_before_anything(
    group: Group, monkeypatch: pytest.MonkeyPatch, rights: tuple[str, ...], missing: str
) -> None:
    monkeypatch.setattr(choice, "coordinates", lambda *_: False)
    _as_user(group, monkeypatch, rights, "*")
    report = refused()
    assert f"the command {missing}" in report.sentence() + " ".join(found.value for found in report.findings)
    assert group.agreed_master() == group.master.address
    info = group.master.client().info("replication", "commandstats")
    assert info["role"] == "master"
    done = [name for name in ("replicaof", "client|pause") if info.get(f"cmdstat_{name}", {"calls": 0})["calls"]]
    assert not done, "tried, and not carried out"


def test_a_user_with_the_least_rights_can(group: Group, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_user(group, monkeypatch, LEAST, "ops-failover:*")
    assert fail_over().status is Status.OK
    assert group.agreed_master() == group.replicas[0].address


def _as_user(group: Group, monkeypatch: pytest.MonkeyPatch, rights: tuple[str, ...], keys: str) -> None:
    for server in group.servers:
        server.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], keys=[keys], commands=[*rights])
    group.register(monkeypatch, extra='username = "ops"\n')


def test_planned_is_refused_where_the_master_is_dead(group: Group) -> None:
    group.master.crash()  # the Sentinels' patience is longer than the run
    report = refused()
    assert "CRITICAL" in finding(report, "answers")
    assert group.replicas[0].client().info("replication")["role"] == "slave"


def test_unplanned_is_refused_where_it_lives(group: Group) -> None:
    report = refused("unplanned")
    assert "split brain" in finding(report, "is dead from this host")
    assert "mode=planned" in report.sentence()
    assert group.agreed_master() == group.master.address


def test_one_sentinel_s_opinion_is_not_enough() -> None:
    told = {"quorum": 2, "others": 2, "can_decide": True, "master": "a:1"}
    views = [SentinelView(f"s:{n}", flags=frozenset({"master"}), **told) for n in range(3)]  # type: ignore[arg-type]
    views[0] = replace(views[0], flags=frozenset({"master", "s_down"}))
    report = Report("Redis failover", NAME)
    with pytest.raises(RunbookFailed):
        findings.judge_dead(report, Group_(Watch(tuple(views)), {"a:1": GroupMember("a:1", "gone", dead=True)}))
    assert "down for 1 of 3" in finding(report, "for a quorum of the Sentinels")


def test_a_killed_master_is_taken_over_and_the_loss_is_bounded(group: Group) -> None:
    with Writer(group) as writer:
        seen = group.sentinels[0].client()
        writer.wait(500)
        # One of the Sentinels' readings while the client writes, so that there is a rate to go by.
        begun = time.monotonic()
        until(
            lambda: seen.sentinel_master(MASTER)["info-refresh"] < (time.monotonic() - begun - 2) * 1000,
            what="a fresh INFO",
            seconds=120,
        )
        group.in_step()  # the replica has what it had then
        writer.wait(200)
        group.master.crash()
        notice_deaths(group.sentinels)
        report = fail_over("unplanned")
        writer.wait(50)
    new = group.at(group.agreed_master())
    lost = writer.lost(new)
    assert new is group.replicas[0]
    assert report.status is Status.WARN
    assert group.master.address in finding(report, "servers that are down")
    safe = datetime.fromisoformat(report.facts["no acknowledged write lost before"]).timestamp()
    assert all(writer.acknowledged[number] >= safe for number in lost)
    assert len(lost) <= int(report.facts["acknowledged writes lost, at most, at the last known load"].replace(",", ""))
    settles(lambda: leftovers(group) == [], "the end of what it wrote")
    group.master.start()
    until(lambda: follows(group.master, new), what="the old master as a replica", seconds=120)


def test_a_frozen_master_is_taken_over_and_follows_when_it_wakes(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.master.freeze()
    notice_deaths(group.sentinels)
    monkeypatch.setattr(ANSWER, 5.0)
    report = fail_over("unplanned")
    new = group.replicas[0]
    assert report.status is Status.WARN
    assert group.agreed_master() == new.address
    again = fail_over("unplanned")
    assert "nothing to do" in again.outcome
    group.master.thaw()
    until(lambda: follows(group.master, new), what="the old master as a replica", seconds=120)


def without_own_failover(group: Group) -> None:
    """The master is dead, and the Sentinels start no failover: they wait for twice as long after one that came to
    nothing, or that they have voted for."""
    replica = group.replicas[0].client()
    replica.config_set("replica-priority", 0)

    def priorities() -> set[int]:
        told = [found for sentinel in group.sentinels for found in sentinel.client().sentinel_slaves(MASTER)]
        return {int(found["slave-priority"]) for found in told}

    until(lambda: priorities() == {0}, what="the Sentinels' next INFO", seconds=120)
    group.master.crash()
    notice_deaths(group.sentinels, timeout_ms=600_000)
    assert "priority 0" in finding(refused("unplanned"), "fit replica")
    until(
        lambda: all("+vote-for-leader" in sentinel.log.read_text() for sentinel in group.sentinels),
        what="the vote of each",
        seconds=120,
    )
    replica.config_set("replica-priority", 100)
    until(lambda: priorities() == {100}, what="the Sentinels' next INFO", seconds=120)


def test_where_the_sentinels_do_not_begin_it_is_begun(group: Group) -> None:
    with Writer(group) as writer:
        writer.wait(100)
        group.in_step()
    group.in_step()
    without_own_failover(group)
    plan = redis_failover.fn(NAME, mode="unplanned")
    assert "at most the writes of Redis of the last" in plan.headline, plan.headline
    report = fail_over("unplanned")
    assert report.facts["master"].endswith("forced by this run")
    assert group.agreed_master() == group.replicas[0].address
    loss = report.losses["Redis"]
    assert loss.since
    assert loss.at_most
    assert all(writer.acknowledged[number] >= loss.since.timestamp() for number in writer.lost(group.replicas[0]))


def test_a_replica_that_lost_its_data_after_the_plan_is_not_promoted(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeded failure: it restarts without its files, and the Sentinels start no failover by themselves."""
    group.master.client().set("k", "v")
    group.in_step()
    without_own_failover(group)
    replica, real = group.replicas[0], failover._judge_again

    def judged(*given: Any) -> None:
        real(*given)
        replica.crash()
        for path in replica.data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        replica.start()

    monkeypatch.setattr(failover, "_judge_again", judged)
    report = refused("unplanned")
    assert "the loss of Redis is unknown" in report.sentence()
    assert "but the plan said: at most the writes of Redis" in report.sentence()
    assert report.state
    assert report.state.value == f"a failover {group.master.address} → {replica.address} may have begun", "no pause"
    assert replica.client().info("replication")["role"] == "slave", "it was not promoted"


@pytest.mark.parametrize("place", ["remembered", "paused", "caught up", "begun", "promoted", "agreed"])
def test_killed_anywhere_it_is_launched_again_and_ends_well(group: Group, place: str) -> None:
    with Writer(group) as writer:
        child = process("planned", "forced", OPS_FAILPOINT=f"failover: {place}")
        child.communicate(timeout=300)
        assert child.returncode == -signal.SIGKILL
        if place in ("begun", "promoted", "agreed"):
            group.wait_for_master_other_than(group.master)
        else:
            writer.wait(2)  # the pause ends by itself; one of them may have been on its way before it
        report = fail_over()
        writer.wait(20)
    new = group.at(group.agreed_master())
    assert new is group.replicas[0]
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    done = place in ("begun", "promoted", "agreed")
    assert ("nothing to do" in report.outcome) is done
    assert writer.lost(new) == set()
    assert follows(group.master, new)
    settles(lambda: b"ops-failover:begun" not in leftovers(group), "the end of its note, on all servers")


def test_somebody_else_promotes_between_judgement_and_act(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    allow = Report.allow

    def meanwhile(self: Report, *acts: Any, **effect: Any) -> None:
        allow(self, *acts, **effect)
        group.fail_over()

    monkeypatch.setattr(Report, "allow", meanwhile)
    report = refused()
    assert "changed since the plan" in report.sentence()
    assert group.agreed_master() == group.replicas[0].address, "it was not turned back"


def test_a_replica_promoted_by_hand_under_its_feet(group: Group) -> None:
    for sentinel in group.sentinels:  # they would turn it back after four times as long
        call(sentinel.client(), "SENTINEL", "DEBUG", "PUBLISH-PERIOD", 60_000)
    child = process(OPS_FAILPOINT="failover: paused:pause")
    wait_until_stopped(child)
    call(group.replicas[0].client(), "REPLICAOF", "NO", "ONE")
    said = end(child)
    assert child.returncode == 1
    assert "promoted by another client; writes continue" in said
    assert takes_writes(group.master), "the pause is lifted"


def test_a_run_that_stands_still_for_longer_than_its_pause_begins_nothing(group: Group) -> None:
    with Writer(group) as writer:
        child = process(OPS_FAILPOINT="failover: caught up:pause")
        wait_until_stopped(child)
        writer.wait(2)  # they stood still until the pause ended by itself; one may have been on its way before it
        said = end(child)
        writer.wait(50)
    assert "suspended for longer than the pause" in said
    assert group.agreed_master() == group.master.address
    assert writer.lost(group.master) == set()


def test_the_master_dies_while_writes_are_paused(group: Group) -> None:
    child = process(OPS_FAILPOINT="failover: caught up:pause")
    wait_until_stopped(child)
    group.master.crash()
    said = end(child)
    assert child.returncode == 1, said
    assert "has died meanwhile" in said
    assert "mode=unplanned" in said
    notice_deaths(group.sentinels)
    new = group.wait_for_master_other_than(group.master)
    report = fail_over("unplanned")
    assert report.status is Status.WARN
    assert new.address in report.outcome


def test_sentinels_that_may_not_hand_over_are_told_and_writes_go_on(group: Group) -> None:
    for server in group.servers:
        rights = ["+@all", "-failover"]
        server.client().acl_setuser(
            "watch", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], commands=rights
        )
    for sentinel in group.sentinels:
        call(sentinel.client(), "SENTINEL", "SET", MASTER, "auth-user", "watch")

    def seen() -> bool:
        return all("disconnected" not in found.client().sentinel_master(MASTER)["flags"] for found in group.sentinels)

    until(seen, what="the Sentinels' new connections", seconds=120)
    if group.master.client().info("server").get("server_name") != "valkey":
        assert fail_over().status is Status.OK, "only Valkey's Sentinels hand over by FAILOVER"
        return
    with Writer(group) as writer:
        report = refused()
        writer.wait(50)
    assert "a promotion did not happen" in report.sentence()
    assert "+failover" in report.sentence()
    assert writer.lost(group.at(group.agreed_master())) == set()


def test_without_sentinels_it_says_so(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.master.register(monkeypatch)
    with pytest.raises(OpsError, match="no Sentinels monitor this Redis"):
        fail_over()


def test_the_probe_is_a_client_as_an_application_has_it(group: Group) -> None:
    from tasks.redis.failover.ledger import following

    block = group.master.block(sentinels=[s.address for s in group.sentinels], sentinel_master=MASTER)
    client = following(block)

    def written() -> bool:
        try:
            return bool(client.set("k", "v"))
        except redis.RedisError:
            return False

    until(written, what="a write on the master", seconds=120)
    assert cast(Any, client.connection_pool).master_address == ("127.0.0.1", group.master.port)
    group.lose_master()
    until(written, what="a write on the new master", seconds=120)
    assert cast(Any, client.connection_pool).master_address == ("127.0.0.1", group.replicas[0].port)
