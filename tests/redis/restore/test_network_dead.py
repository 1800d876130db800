"""A restore over the network that was killed, and whose server is dead when it is launched again."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from flows.redis.persistence import backup_redis
from runbook import kinds
from runbook.errors import OpsError
from runbook.report import Status
from runbook.wait import until
from tasks.redis.restore.network import RECORD
from tasks.redis.server import call
from tasks.redis.topology import isolation
from tasks.redis.topology.topology import RECORD as DETACHED
from tests.redis.restore.test_network import failed, killed, register, restore
from tests.redis.servers import MASTER, PASSWORD, Group, RedisServer, running_redis


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


def test_a_dead_server_is_named_and_the_one_in_its_place_gets_the_data(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Sentinels the environment says which one that is; its own data is kept, and the dead one is told."""
    register(server, monkeypatch)
    server.client().mset({f"k:{n}": n for n in range(100)})
    backup_redis.fn("redis-test")
    assert killed("redis: live server follows", restoring=True) == -signal.SIGKILL
    server.crash()
    told = failed().sentence()
    assert f"{server.address}, the server of a killed restore, does not answer" in told
    assert "start it and run this again" in told
    with running_redis() as other:
        other.client().set("own", 1)
        path = server.root / "environment.toml"
        path.write_text(path.read_text().replace(f"port = {server.port}\n", f"port = {other.port}\n"))
        report = restore()
        assert report.status is Status.WARN, report.sentence()
        assert f"this run restores {other.address}" in report.sentence()
        assert (other.client().dbsize(), other.client().exists("own")) == (100, 0)
    assert not (server.root / "reports" / RECORD).exists()


@pytest.mark.soak
def test_under_sentinel_what_is_said_is_done_and_then_it_ends_well(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Sentinels have forgotten the dead master, and will name nobody by themselves."""
    register(group, monkeypatch)
    group.master.client().mset({f"k:{n}": n for n in range(100)})
    backup_redis.fn("redis-test")
    assert killed("redis: live server follows", restoring=True) == -signal.SIGKILL
    group.master.crash()
    replica = group.replicas[0]
    hint = failed().sentence()
    host, port = "127.0.0.1", str(replica.port)
    assert f"REPLICAOF NO ONE on {replica.address}" in hint
    assert f"SENTINEL MONITOR {MASTER} {host} {port} 2" in hint
    call(replica.client(), "REPLICAOF", "NO", "ONE")
    for sentinel in group.sentinels:
        call(sentinel.client(), "SENTINEL", "MONITOR", MASTER, host, port, "2")
        call(sentinel.client(), "SENTINEL", "SET", MASTER, "auth-pass", PASSWORD)
    until(lambda: _know_each_other(group), what="Sentinels that know each other", seconds=120)
    replica.client().set("garbage", 1)
    report = restore()
    assert report.status is Status.WARN, report.sentence()
    assert (replica.client().dbsize(), replica.client().info("replication")["role"]) == (100, "master")
    assert group.agreed_master() == replica.address
    assert not list((group.master.root / "reports").glob("redis-*.json"))


def _know_each_other(group: Group) -> bool:
    states: list[dict[str, Any]] = [one.client().sentinel_master(MASTER) for one in group.sentinels]
    return all(int(state["num-other-sentinels"]) == len(group.sentinels) - 1 for state in states)


def test_a_taking_off_that_fails_half_way_is_put_back(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Sentinels have forgotten the master by then: nothing replicates from nowhere, and they watch again."""
    register(group, monkeypatch)
    group.master.client().mset({f"k:{n}": n for n in range(100)})
    backup_redis.fn("redis-test")
    real = isolation.failpoint

    def fails(name: str) -> None:
        real(name)
        if name == "redis: replicas isolated":
            raise OpsError("the replica refuses")

    monkeypatch.setattr(isolation, "failpoint", fails)
    with pytest.raises(OpsError, match="the replica refuses"):
        restore()
    monkeypatch.undo()
    assert group.agreed_master() == group.master.address
    info = group.replicas[0].client().info("replication")
    assert (info["role"], info["master_port"], info["master_link_status"]) == ("slave", group.master.port, "up")
    assert not (group.master.root / "reports" / DETACHED).exists()
