"""Where too few Sentinels name the master: what reads says so, what changes is refused, and an operator's word counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.redis.cache import clear_cache
from flows.redis.memory.check import check_redis_memory
from flows.redis.persistence import backup_redis, check_redis_persistence, snapshot_redis
from runbook import kinds
from runbook.errors import RunbookFailed
from runbook.report import Finding, Report, Status
from runbook.wait import until
from tasks.redis.cache import server as cache_server
from tasks.redis.cache import sweep as cache_sweep
from tasks.redis.sentinels import SentinelView, Watch
from tasks.redis.server import call
from tests.redis.servers import MASTER, NAME, Group, RedisServer

VOUCHED = "the Sentinels vouch for the master"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


def fill(server: RedisServer, count: int = 100) -> None:
    server.client().mset({f"cache:{n}": "x" for n in range(count)})


def finding(report: Report, name: str = VOUCHED) -> Finding:
    (found,) = [found for found in report.findings if found.name == name]
    return found


def clear(**parameters: object) -> Report:
    report: Report = clear_cache.fn(NAME, prefixes=("cache:",), **{"confirm": NAME, **parameters})
    return report


def refused(**parameters: object) -> Report:
    with pytest.raises(RunbookFailed) as raised:
        clear(**parameters)
    return raised.value.report


def forbid(group: Group) -> None:
    """They ask for a password that the environment has not."""
    for sentinel in group.sentinels:
        sentinel.client().acl_setuser("default", enabled=True, reset_passwords=True, passwords=["+other"])


def kill_all(group: Group) -> None:
    for sentinel in group.sentinels:
        sentinel.crash()


def leave_one(group: Group) -> None:
    for sentinel in group.sentinels[1:]:
        sentinel.crash()


def forget(group: Group) -> None:
    for sentinel in group.sentinels:
        call(sentinel.client(), "SENTINEL", "REMOVE", MASTER)


@pytest.mark.parametrize(
    ("lose", "value"),
    [
        (kill_all, "0 of 3 Sentinels name"),
        (leave_one, "1 of 3 Sentinels name"),
        (forbid, "Authentication"),
        (forget, "watches none"),
    ],
)
def test_what_reads_says_so_and_what_changes_is_refused(
    group: Group, lose: Callable[[Group], None], value: str
) -> None:
    """Also in its plan. The operator's word for that very server counts, and is recorded; for another it does not."""
    master = group.master
    fill(master)
    lose(group)
    told = finding(check_redis_memory.fn(NAME))
    assert (told.status, value in told.value) == (Status.WARN, True), told
    assert all(sentinel.address in told.value for sentinel in group.sentinels[1:])
    for confirm in ("", NAME):
        report = refused(confirm=confirm)
        assert finding(report).status is Status.CRITICAL
        assert f"run it with master={master.address}" in finding(report).hint
    assert f"but the server is {master.address}" in refused(master=group.replicas[0].address).sentence()
    assert master.client().dbsize() == 100
    report = clear(master=master.address)
    assert (finding(report).status, master.client().dbsize()) == (Status.WARN, 0)
    assert f"the operator confirmed it (master={master.address})" in finding(report).value


def test_flows_of_persistence_say_so(group: Group) -> None:
    fill(group.master)
    leave_one(group)
    with pytest.raises(RunbookFailed) as raised:  # its settings are not the manual's
        check_redis_persistence.fn(NAME)
    for report in (raised.value.report, snapshot_redis.fn(NAME), backup_redis.fn(NAME)):
        assert finding(report).status is Status.WARN


def test_where_a_majority_names_it_nothing_is_said(group: Group) -> None:
    group.sentinels[2].crash()
    fill(group.master)
    assert not any(found.name == VOUCHED for found in check_redis_memory.fn(NAME).findings)
    assert clear().status is not Status.CRITICAL
    assert "parameter master is 127.0.0.1:1" in refused(master="127.0.0.1:1").sentence()


def test_a_master_that_was_replaced_is_not_cleared(group: Group) -> None:
    """It comes back while the Sentinels are gone, and the environment names it."""
    old = group.master
    new = group.lose_master()
    kill_all(group)
    old.start()
    fill(old)
    assert old.client().info("replication")["role"] == "master" != new.address
    assert finding(refused()).status is Status.CRITICAL
    assert old.client().dbsize() == 100


@pytest.mark.parametrize("waived", [False, True])
def test_sentinels_that_go_away_meanwhile(group: Group, monkeypatch: pytest.MonkeyPatch, waived: bool) -> None:
    fill(group.master, 1000)
    monkeypatch.setattr(cache_server, "RECHECK_SECONDS", 0.0)
    pages = iter(range(1, 1000))

    def lose(name: str) -> None:
        if "unlinked" in name and next(pages) == 2:
            leave_one(group)

    monkeypatch.setattr(cache_sweep, "failpoint", lose)
    if waived:
        assert clear(master=group.master.address).outcome.startswith("1,000 keys unlinked")
        return
    told = refused().sentence()
    assert "too few Sentinels name the master now: 1 of 3 Sentinels name" in told
    assert "keys were unlinked by then, the rest is untouched" in told
    assert 0 < group.master.client().dbsize() < 1000


def test_a_waiver_does_not_hold_against_a_sentinel_that_names_another(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(group.master, 1000)
    monkeypatch.setattr(cache_server, "RECHECK_SECONDS", 0.0)
    replica = group.replicas[0]
    pages = iter(range(1, 1000))

    def name_another(name: str) -> None:
        if "unlinked" in name and next(pages) == 2:
            call(group.sentinels[0].client(), "SENTINEL", "REMOVE", MASTER)
            call(group.sentinels[0].client(), "SENTINEL", "MONITOR", MASTER, "127.0.0.1", replica.port, 2)

    monkeypatch.setattr(cache_sweep, "failpoint", name_another)
    report = refused(master=group.master.address)
    assert f"is no longer the master: the Sentinels name {replica.address}" in report.sentence()


def test_as_many_must_name_it_as_a_failover_needs() -> None:
    def watch(*named: str, quorum: int = 2, others: int = 2) -> Watch:
        return Watch(
            tuple(
                SentinelView(f"s{n}:1", "silent" if not name else "", name, quorum=quorum, others=others)
                for n, name in enumerate(named)
            )
        )

    assert Watch(()).doubt("a:1") == ""
    assert watch("a:1", "a:1", "").doubt("a:1") == ""
    assert watch("a:1", "", "").doubt("a:1") == "1 of 3 Sentinels name a:1, 2 are needed (s1:1: silent; s2:1: silent)"
    assert watch("a:1", "a:1", "", quorum=3).doubt("a:1").startswith("2 of 3 Sentinels name a:1, 3 are needed")
    told = "1 of 1 Sentinels name a:1, 2 are needed (the others are not in [redis] sentinels)"
    assert watch("a:1", others=2).doubt("a:1") == told, "it knows of others"
    assert watch("a:1", "", "", quorum=1, others=0).doubt("a:1"), "one that was reset knows of none"
    assert "s1:1: names b:2" in watch("a:1", "b:2", "").doubt("a:1")


def test_the_sentinels_are_asked_again_when_they_are_back(group: Group) -> None:
    fill(group.master)
    kill_all(group)
    assert finding(refused()).status is Status.CRITICAL
    for sentinel in group.sentinels:
        sentinel.start()
    until(lambda: group.agreed_master() == group.master.address, what="the Sentinels", seconds=120)
    assert clear().outcome.startswith("100 keys unlinked")
