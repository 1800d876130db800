"""diagnose-redis: each cause in pairs; the first finding is the true cause, and its hint mends it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import redis

from runbook.report import Status
from tasks.redis import greeting
from tests.troubleshooting.conftest import Host, cause
from tests.troubleshooting.seeds import Faults, assert_order, carry_out
from tests.troubleshooting.test_redis import configured, diagnosed

DOWN, MEMORY, SAVE = (
    "is down: the server's process is dead",
    "its policy evicts nothing: writes",
    "the last save failed",
)
LOADING, TWO = "is still loading its data", "takes writes, but it must be a replica"
REPLICA, RESTARTED = "the replica at", "the process before it ended without a shutdown"
PAIRS = [  # what is seeded → what is found first, what comes next, a part of the first hint
    (("redis_dead", "replica_dead"), DOWN, REPLICA, "supervisorctl start redis"),
    (("redis_halted", "replica_dead"), "hangs", REPLICA, "kill -CONT"),
    (("memory", "maxclients"), "has reached maxclients", "", "stop one of the application's workers"),
    (("memory", "redis_password"), "refuses the password", "", "correct the secret"),
    (("memory", "failed_save"), MEMORY, SAVE, "clear caches by prefix"),
    (("memory", "replica_dead"), MEMORY, REPLICA, "clear caches by prefix"),
    (("failed_save", "replica_dead"), "refuses writes, since its last save failed", REPLICA, "fix the cause"),
    (("too_few_replicas", "replica_dead"), REPLICA, "fewer replicas are in sync", "start it"),
    (("too_few_replicas",), "fewer replicas are in sync", "", "start the replicas"),
    (("of_another_master", "replica_dead"), "is a replica: it rejects writes", REPLICA, "set [redis] to the master"),
    (("memory", "busy_script"), "while a script runs", "", "SCRIPT KILL"),
    (("loading",), LOADING, "", "wait"),
    (("loading", "replica_dead"), LOADING, REPLICA, "wait"),
    (("loading", "two_masters"), LOADING, TWO, "wait"),
    (("redis_dead", "two_masters"), DOWN, TWO, "supervisorctl start redis"),
    (("two_masters",), TWO, "", "REPLICAOF"),
    (("two_masters", "memory"), TWO, MEMORY, "REPLICAOF"),
    (("two_masters", "too_few_replicas"), TWO, "fewer replicas are in sync", "REPLICAOF"),
]


@pytest.fixture
def faults(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Faults:
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.5)
    return Faults(host, tmp_path, request)


@pytest.mark.parametrize(("seeds", "first", "second", "hint"), PAIRS, ids=["+".join(one[0]) for one in PAIRS])
def test_the_first_finding_is_the_true_cause(
    faults: Faults, seeds: tuple[str, ...], first: str, second: str, hint: str
) -> None:
    report = faults.diagnose(diagnosed, seeds, first, second, hint)
    if "replica_dead" in seeds and first in (DOWN, "hangs"):
        assert "redis-failover" not in [one.flow for one in report.findings[0].follow]
    if "loading" in seeds:
        assert [one.flow for one in report.findings[0].follow] == ["diagnose-redis"]


def test_a_server_killed_a_minute_ago_is_found_by_its_uptime(faults: Faults) -> None:
    with contextlib.ExitStack() as stack:
        faults.open(stack, "redis_killed")
        report = diagnosed()
        assert report.status is Status.WARN
        assert_order(report, RESTARTED)
        assert "terminated by SIGKILL; not expected" in cause(report)
        assert "it loaded " in cause(report)
        assert "check-redis-persistence" in [one.flow for one in report.findings[0].follow]
        faults.open(stack, "memory")
        assert_order(diagnosed(), MEMORY, RESTARTED)
    assert diagnosed().status is Status.OK, "an orderly restart is none"


def test_full_memory_is_mended_by_the_linked_runbook(faults: Faults) -> None:
    client = faults.host.redis.client()
    limit = int(client.info("memory")["used_memory"]) + 3_000_000
    with configured(faults.host, **{"maxmemory-policy": "noeviction", "maxmemory": str(limit)}):
        try:
            client.set("session:1", "kept")
            with contextlib.suppress(redis.exceptions.OutOfMemoryError):
                for number in range(100_000):
                    client.set(f"cache:{number}", "x" * 10_000)
            client.config_set("maxmemory", limit - 500_000)  # not even the smallest write is accepted
            report = diagnosed()
            assert_order(report, MEMORY)
            assert carry_out(report).status in (Status.OK, Status.WARN)
            after = diagnosed()
            assert after.status is Status.OK, cause(after)
            assert client.get("session:1") == b"kept"
        finally:
            client.flushdb()
