"""What a server, or the way to it, refuses: each is one sentence that names the remedy, and none takes minutes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import redis

from blocks.redis.server import Redis
from flows.redis.cache import clear_cache
from flows.redis.memory.check import check_redis_memory
from runbook import kinds
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.backup.rdb import accepts
from tasks.redis.sentinels import ask_sentinels
from tasks.redis.server import call, connected
from tests.redis.servers import NAME, RedisServer, running_redis
from tests.redis.tls import tls_in_front


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RETRY_DELAYS_SECONDS", [0.05, 0.05, 0.05])


def told(block: Redis) -> OpsError:
    """What the first look at a server says."""
    with pytest.raises(OpsError) as raised, connected(block) as client:
        client.info()
    return raised.value


def failed(**parameters: object) -> Report:
    with pytest.raises(RunbookFailed) as raised:
        clear_cache.fn(NAME, prefixes=("cache:",), **parameters)
    return raised.value.report


def break_a_save(client: redis.Redis) -> None:
    client.config_set("save", "3600 1")
    client.config_set("rdb-key-save-delay", 1_000_000)  # minutes: it is in the middle whenever it is killed
    client.bgsave()
    for child in psutil.Process(int(client.info("server")["process_id"])).children():
        child.kill()
    until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", what="the failure", seconds=120)


def lack_replicas(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 1)


@pytest.mark.parametrize(
    ("block_writes", "what", "remedy"),
    [
        (break_a_save, "takes no writes, because its last save", "check-redis-persistence reports the cause"),
        (lack_replicas, "takes no writes, because fewer replicas are in sync", "start the replicas that are down"),
    ],
)
def test_a_server_that_takes_no_writes(
    server: RedisServer, block_writes: Callable[[redis.Redis], None], what: str, remedy: str
) -> None:
    """It can be looked at; a clearing learns it in its plan, and is told what to do when it was not planned."""
    client = server.client()
    client.mset({f"cache:{n}": "x" for n in range(100)})
    block_writes(client)
    memory: Report = check_redis_memory.fn(NAME)
    assert memory.facts["sweep"].startswith("100 of 100 keys")
    plan = failed()
    assert what in plan.sentence()
    assert remedy in plan.sentence()
    assert plan.status is Status.CRITICAL
    assert what in failed(confirm=NAME).sentence()
    assert remedy in failed(confirm=NAME).sentence()
    with pytest.raises(RunbookFailed, match=what):
        clear_cache.fn(NAME, flush=True)
    assert int(client.execute_command("DBSIZE")) == 100


@contextlib.contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """A script that does not end."""
    client = server.client()
    client.config_set("busy-reply-threshold", 50)

    def loop() -> None:
        with contextlib.suppress(redis.RedisError):
            server.client(socket_timeout=60).eval("while true do end", 0)

    thread = threading.Thread(target=loop)
    thread.start()

    def is_busy() -> bool:
        try:
            server.client().ping()
        except redis.ResponseError as error:
            return str(error).startswith("BUSY")
        return False

    until(is_busy, what="the script", seconds=120)
    try:
        yield
    finally:
        call(client, "SCRIPT", "KILL")
        thread.join()


def forbid_restoring(client: redis.Redis) -> None:
    call(client, "ACL", "SETUSER", "default", "-restore")


def follow_nobody(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        (lambda client: client.config_set("maxmemory", 1), "is at its maxmemory: it takes no writes"),
        (break_a_save, "takes no writes, because its last save"),
        (lack_replicas, "takes no writes, because fewer replicas"),
        (forbid_restoring, "forbids user default the command RESTORE"),
        (follow_nobody, "is a replica: it takes no writes"),
    ],
)
def test_only_a_wrong_version_is_taken_for_one(
    server: RedisServer, trouble: Callable[[redis.Redis], object], what: str
) -> None:
    """Whether a server takes a backup's values is asked by a RESTORE that it must refuse: for which reason decides."""
    client, block = server.client(), server.block()
    client.set("cache:1", "x")
    assert [accepts(client, version) for version in (6, 9, 255)] == [True, True, False]
    trouble(client)
    for version in (9, 255):
        with pytest.raises(redis.RedisError) as error:
            accepts(client, version)
        assert what in str(block.refused(error.value))
    assert client.exists("ops:no-such-key") == 0


def test_a_server_that_is_busy_with_a_script(server: RedisServer) -> None:
    with busy(server):
        error = told(server.block())
    assert isinstance(error, Unreachable)
    assert "answers nobody while a script runs — wait until it ends; SCRIPT KILL" in str(error)


def test_a_replica_without_its_master_that_answers_nothing(server: RedisServer) -> None:
    server.client().config_set("replica-serve-stale-data", "no")
    server.client().replicaof("127.0.0.1", "1")
    assert "is a replica without its master" in told(server.block()).message
    call(server.client(), "REPLICAOF", "NO", "ONE")


def test_a_server_that_is_full(server: RedisServer) -> None:
    held = [server.client() for _ in range(5)]
    for client in held:
        client.ping()
    held[0].config_set("maxclients", 5)
    with pytest.raises(RunbookFailed, match="has reached maxclients: it takes no more connections") as raised:
        check_redis_memory.fn(NAME)
    assert "close-idle-redis-clients" in raised.value.report.sentence()
    assert isinstance(told(server.block()), Unreachable)
    for client in held:
        client.close()


@pytest.mark.parametrize("command", ["MULTI", "CLIENT", "INFO"])
def test_a_command_that_is_renamed_is_named(command: str) -> None:
    with running_redis(settings=(f'rename-command {command} ""',)) as server:
        with pytest.raises(OpsError) as raised, connected(server.block()) as client:
            call(client, command, "list") if command != "INFO" else client.info()
        assert f"does not know the command {command} — its configuration renames it" in str(raised.value)


@pytest.mark.parametrize(
    ("command", "named", "parameters"),
    [
        ("UNLINK", "UNLINK", {"prefixes": ("cache:",)}),
        ("SCAN", "SCAN or PTTL", {"prefixes": ("cache:",)}),
        ("FLUSHDB", "FLUSHDB", {"flush": True, "plan": "any"}),
    ],
)
def test_a_clearing_without_its_command_says_which(
    monkeypatch: pytest.MonkeyPatch, command: str, named: str, parameters: Mapping[str, object]
) -> None:
    """In the plan and where it was not planned."""
    with running_redis(settings=(f'rename-command {command} ""',)) as server:
        server.register(monkeypatch)
        server.client().set("cache:1", "x")
        for confirm in ("", NAME):
            with pytest.raises(RunbookFailed, match=f"does not know the command {named}") as raised:
                clear_cache.fn(NAME, confirm=confirm, **parameters)
            assert "rename-command" in raised.value.report.sentence()
        assert server.client().get("cache:1") == b"x"


def test_without_multi_rights_are_not_tried_and_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be thrown away with its transaction would be carried out without one."""
    with running_redis(settings=('rename-command MULTI ""',)) as server:
        server.register(monkeypatch)
        server.client().set("cache:1", "x")
        assert clear_cache.fn(NAME, prefixes=("cache:",)).status is Status.PLANNED
        assert clear_cache.fn(NAME, flush=True).status is Status.PLANNED
        assert server.client().get("cache:1") == b"x"


def test_a_server_that_hangs_is_told_soon(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the greeting's own patience: not by that for an answer, which may take a minute."""
    monkeypatch.setattr("tasks.redis.server.GREETING_SECONDS", 0.3)
    with contextlib.ExitStack() as stack:
        client = until(lambda: stack.enter_context(connected(server.block())), what="a greeting in time", seconds=120)
        call(client, "DEBUG", "SLEEP", "0.6")
        with client.client() as another:
            call(another, "DEBUG", "SLEEP", "0.6")
    server.freeze()
    monkeypatch.setattr("tasks.redis.server.SOCKET_SECONDS", 3600.0)
    monkeypatch.setattr("blocks.redis.server.SOCKET_SECONDS", 3600.0)
    assert "does not answer in time — it hangs or is unreachable" in str(told(server.block()))
    server.thaw()


def test_files_of_tls_that_are_missing_or_of_no_use(server: RedisServer, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("x")
    with tls_in_front(server, tmp_path, ["127.0.0.1"]) as (port, certificate):

        def block(**files: object) -> Redis:
            return server.block(port=port, tls=True, **{"tls_ca_file": str(certificate), **files})

        with connected(block()) as client:
            assert client.ping()
        assert "[redis] tls_ca_file: /nowhere.pem cannot be read" in told(block(tls_ca_file="/nowhere.pem")).message
        own = {"tls_certificate_file": str(certificate), "tls_key_file": "/nowhere.key"}
        assert "[redis] tls_key_file: /nowhere.key cannot be read" in told(block(**own)).message
        assert "no certificate or crl found" in told(block(tls_ca_file=str(garbage))).message


def test_a_client_s_certificate_that_is_asked_for(server: RedisServer, tmp_path: Path) -> None:
    with tls_in_front(server, tmp_path, ["127.0.0.1"], asks=True) as (port, certificate):
        bare = server.block(port=port, tls=True, tls_ca_file=str(certificate))
        error = told(bare)
        assert "its certificate is refused" not in error.message
        assert "client's certificate" in error.hint
        own = {"tls_certificate_file": str(certificate), "tls_key_file": str(certificate.with_name("key.pem"))}
        with connected(bare.model_copy(update=own)) as client:
            assert client.ping()


def test_a_port_of_the_other_kind(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No retry mends that: it is said at the first look, of a Sentinel's port too; a server that hangs is told apart."""
    with tls_in_front(server, tmp_path, ["127.0.0.1"]) as (port, certificate):
        monkeypatch.setattr("blocks.redis.wire.PATIENCE_SECONDS", 60.0)
        plain = told(server.block(port=port))
        assert not isinstance(plain, Unreachable)
        assert plain.message.endswith("uses TLS on this port, but [redis] tls is false")
        monkeypatch.setattr("tasks.redis.server.GREETING_SECONDS", 0.5)
        monkeypatch.setattr("blocks.redis.server.CONNECT_SECONDS", 0.5)
        secured = server.block(tls=True, tls_ca_file=str(certificate), sentinels=[server.address])
        other = told(secured)
        assert not isinstance(other, Unreachable)
        assert other.message.endswith("uses no TLS on this port, but [redis] tls is true")
        assert other.hint == "correct tls or port in [redis], and register the blocks again"
        (view,) = ask_sentinels(secured).views
        assert view.problem == "uses no TLS on this port, but [redis] tls is true"
        server.freeze()
        monkeypatch.setattr("blocks.redis.wire.PATIENCE_SECONDS", 0.3)
        assert isinstance(told(secured), Unreachable)
