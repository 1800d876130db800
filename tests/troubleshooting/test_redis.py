"""diagnose-redis: each cause on a real server is named first, and a healthy one has none."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.troubleshooting import redis as redis_flow
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.host import ports
from tasks.redis import greeting
from tests.fixtures.servers import free_port
from tests.troubleshooting.conftest import Host, cause, evidence, following


def diagnosed() -> Report:
    """Its report, critical or not."""
    try:
        return redis_flow.diagnose_redis.fn(environment="sick")
    except RunbookFailed as error:
        return error.report


@contextlib.contextmanager
def configured(host: Host, **settings: str) -> Iterator[None]:
    """CONFIG SET, and back."""
    client = host.redis.client()
    before = {name: client.config_get(name)[name] for name in settings}
    client.config_set(*[word for pair in settings.items() for word in pair])
    try:
        yield
    finally:
        client.config_set(*[word for pair in before.items() for word in pair])


def test_of_a_healthy_server_nothing_is_found_and_nothing_is_written(host: Host) -> None:
    before = host.redis.client().dbsize()
    report = diagnosed()
    assert (report.status, cause(report)) == (Status.OK, "nothing found")
    assert host.redis.client().dbsize() == before
    assert "Ready to accept connections" in evidence(report, "Log of redis").text


def test_a_dead_process(host: Host) -> None:
    with host.stopped("redis"):
        report = diagnosed()
    assert "is down: the server's process is dead (redis is STOPPED" in cause(report)
    assert "show-recovery-options" in following(report)


def test_an_error_in_its_configuration_is_read_from_its_log(host: Host) -> None:
    file, log = host.redis.configuration, host.root / "redis.log"
    before = file.read_text()
    with host.stopped("redis"):
        file.write_text(before + "requirepass secret-5512 secret-5513\n")
        host.services.start("redis")
        until(lambda: "FATAL CONFIG" in log.read_text(), what="its end", seconds=120)
        report = diagnosed()
        file.write_text(before)
    with host.stopped("redis"):
        pass  # an orderly restart: the one before followed failed starts
    assert "its log reports: " in cause(report)
    assert "requirepass ********" in cause(report) or "FATAL CONFIG" in cause(report)
    assert "requirepass ********" in evidence(report, "Log of redis").text
    assert "secret-551" not in str(report.as_json())


def test_a_port_where_nobody_listens_is_no_dead_process(host: Host, tmp_path: Path) -> None:
    host.describe(tmp_path, redis_port=free_port())
    found = cause(diagnosed())
    assert "nobody listens on" in found
    assert "process runs" in found


@pytest.mark.parametrize(
    ("name", "text"), [("no-such-host.invalid", "cannot resolve the name"), ("255.255.255.255", "cannot be reached")]
)
def test_a_host_that_is_away(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setattr(ports, "CONNECT_SECONDS", 1.0)
    host.describe(tmp_path, redis_host=name)
    assert text in cause(diagnosed())


def test_a_server_that_hangs(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_SECONDS", 0.5)
    pid = host.services.state("redis").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert "hangs" in cause(diagnosed())
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_wrong_password(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SICK_REDIS_PASSWORD", "stale-word-78")
    report = diagnosed()
    assert "refuses the password" in cause(report)
    assert "stale-word-78" not in str(report.as_json())


def test_memory_that_is_full_under_noeviction(host: Host) -> None:
    client = host.redis.client()
    with configured(host, **{"maxmemory-policy": "noeviction", "maxmemory": "1"}):
        report = diagnosed()
        assert client.dbsize() == 0
    assert cause(report).startswith("the memory of Redis is full and its policy evicts nothing: writes are refused")
    follow = following(report)
    for part in ("clear-cache", 'prefixes=["cache:"]', "'override=maxmemory 2gb'", "undo-redis-settings", "undo it"):
        assert part in follow
    assert "flush=" not in follow


def test_maxclients_is_reached(host: Host) -> None:
    client = host.redis.client()
    with contextlib.ExitStack() as stack:
        stack.callback(client.config_resetstat)  # those that are turned away are counted, and the server is everybody's
        stack.enter_context(configured(host, maxclients="20"))
        for _ in range(30):
            stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", host.redis.port))))
        report = diagnosed()
    assert "has reached maxclients" in cause(report)
    assert "close-idle-redis-clients" in following(report)
    assert client.ping()


def test_a_save_that_failed_refuses_writes(host: Host) -> None:
    client, file = host.redis.client(), host.redis.data / "dump.rdb"
    file.unlink(missing_ok=True)
    with configured(host, save="3600 1"):
        file.mkdir()  # nothing can be renamed to it
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", what="its failure", seconds=120)
        report = diagnosed()
        file.rmdir()
        client.save()
    assert "refuses writes, since its last save failed (MISCONF)" in cause(report)
    assert "check-redis-persistence" in following(report)


def test_a_replica_takes_no_writes(host: Host) -> None:
    client = host.redis.client()
    client.replicaof("127.0.0.1", str(free_port()))
    try:
        report = diagnosed()
    finally:
        client.replicaof("NO", "ONE")
    assert "is a replica: it rejects writes" in cause(report)


def test_a_probe_that_is_forbidden_is_never_ok(host: Host) -> None:
    client = host.redis.client()
    client.execute_command("ACL", "SETUSER", "default", "-set")
    try:
        report = diagnosed()
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+set")
    assert report.status is Status.WARN
    assert "not found; probes that could not run: 1" in cause(report)
