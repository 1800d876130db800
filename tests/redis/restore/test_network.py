"""Backup and restore of a server whose files cannot be reached: by replication, or key by key."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore import network as network_steps
from flows.redis.restore import target as network_target
from flows.redis.restore.network import ReplicatedRestore
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.redis.backup import network
from tasks.redis.persistence.saving import save_in_background
from tasks.redis.restore.equal import compare_keys
from tasks.redis.restore.network import RECORD
from tasks.redis.restore.route import Route
from tasks.redis.topology.topology import RECORD as DETACHED
from tasks.stores.directory import DirectoryStore
from tests.fixtures.killed import exit_code_at
from tests.fixtures.stand_in import replace_step
from tests.redis.data import account, fill, survivors
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, notice_deaths, settles
from tests.redis.tls import tls_in_front

DROP = 'drop_prefixes = ["cache:", "ca*he:"]'
DATABASES = (0, 3)


def register(server: RedisServer | Group, monkeypatch: pytest.MonkeyPatch, extra: str = "") -> None:
    """As an environment whose files cannot be reached."""
    master = server.master if isinstance(server, Group) else server
    sentinels = [sentinel.address for sentinel in server.sentinels] if isinstance(server, Group) else []
    master.register(monkeypatch, sentinels=sentinels, extra=f"remote = true\n{DROP}\n{extra}")
    path = master.root / "environment.toml"
    text = path.read_text().replace(str(master.data), "/nowhere").replace(str(master.configuration), "/nowhere/x.conf")
    path.write_text(text)


@pytest.fixture
def remote(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """Data of every type in two databases."""
    register(server, monkeypatch)
    fill({number: server.client(number) for number in DATABASES})
    return server


def accounts(server: RedisServer) -> dict[int, dict[bytes, Any]]:
    return {number: account(server.client(number)) for number in DATABASES}


def spoil(server: RedisServer) -> None:
    for number in DATABASES:
        client = server.client(number)
        client.flushdb()
        client.set("garbage", number)
    server.client(7).set("garbage", 7)


def restore(wanted: str = "latest") -> Report:
    return restore_redis.fn(NAME, wanted, confirm=NAME)


def failed(wanted: str = "latest") -> Report:
    with pytest.raises(RunbookFailed) as failure:
        restore(wanted)
    return failure.value.report


def as_user(server: RedisServer, monkeypatch: pytest.MonkeyPatch, *commands: str) -> None:
    """The environment's user may do everything but some commands."""
    rules = ["+@all", *commands]
    server.client().acl_setuser("ops", enabled=True, passwords=["+x"], keys=["*"], channels=["*"], commands=rules)
    register(server, monkeypatch, 'username = "ops"')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "x")


def test_a_backup_comes_over_the_network_while_clients_write(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was acknowledged before the manifest's moment is in it; no secret is in its files."""
    stop, acknowledged = threading.Event(), list[tuple[datetime, int]]()

    def write() -> None:
        client, n = remote.client(), 0
        while not stop.is_set():
            n += 1
            with client.pipeline() as pipe:
                pipe.set(f"w:{n}", "x" * 100)
                pipe.set("last", n)
                pipe.execute()
            acknowledged.append((datetime.now(UTC), n))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: acknowledged, what="the first write", seconds=120)
        report = backup_redis.fn(NAME)
    finally:
        stop.set()
        writer.join()
    assert report.status is Status.OK, report.sentence()
    assert report.facts["taken"] == f"by replication from {remote.address}"
    backup = catalogue.find_backup(DirectoryStore(remote.root / "backups"), "redis")
    wanted = max(n for at, n in acknowledged if at < backup.manifest.taken)
    remote.client().flushall()
    assert restore().status is Status.OK
    assert int(remote.client().get("last") or 0) >= wanted > 0
    assert remote.client().exists(*(f"w:{n}" for n in range(1, wanted + 1))) == wanted
    for path in backup.path.rglob("*"):
        assert PASSWORD.encode() not in path.read_bytes(), path
    assert b"requirepass" in (backup.path / network.RUNNING).read_bytes()


def test_round_trip_by_replication(remote: RedisServer) -> None:
    """Every type and time comes back, other databases are emptied, functions too; settings are as before."""
    before = accounts(remote)
    backup_redis.fn(NAME)
    spoil(remote)
    remote.client().function_flush()
    settings = {name: remote.client().config_get(name) for name in ("masterauth", "masteruser", "repl-diskless-load")}
    plan = restore_redis.fn(NAME)
    assert plan.status is Status.PLANNED
    assert [step.step for step in plan.plan_steps] == ["keep", "replicate", "prove", "restore", "save"]
    assert remote.client(7).get("garbage") == b"7", "a plan changes nothing"
    report = restore()
    assert report.status is Status.OK, report.sentence()
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}
    assert remote.client(7).dbsize() == 0
    assert remote.client().function_list()
    info = remote.client().info("replication")
    assert (info["role"], info["connected_slaves"]) == ("master", 0)
    assert {name: remote.client().config_get(name) for name in settings} == settings
    assert not (remote.root / "reports" / RECORD).exists()
    assert catalogue.open_backup(DirectoryStore(remote.root / "backups"), report.facts["backup"]).verified


def test_the_undo_brings_back_what_was_live(remote: RedisServer) -> None:
    backup_redis.fn(NAME)
    spoil(remote)
    kept = restore().facts["live data kept as"]
    report = restore(kept)
    assert report.status is Status.OK, report.sentence()
    assert [remote.client(number).get("garbage") for number in (*DATABASES, 7)] == [b"0", b"3", b"7"]


def test_prefixes_over_the_network(remote: RedisServer) -> None:
    before = account(remote.client())
    backup_redis.fn(NAME)
    remote.client().set("session:1", "spoilt")
    report = restore_redis.fn(NAME, prefixes=["session:"], confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert account(remote.client()) == before
    assert report.facts["live data kept as"]


def test_without_memory_for_both_the_old_data_goes_first(remote: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = accounts(remote)
    backup_redis.fn(NAME)
    spoil(remote)
    route = Route("replication", "its memory is too small for both", swaps=False)
    monkeypatch.setattr(network_target, "find_route", lambda _block, _needed: route)
    assert restore().status is Status.OK
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}


def test_it_survives_a_restart(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """AOF on: what was replicated is in it. (Without an AOF it is saved at the end.)"""
    register(server, monkeypatch)
    server.client().config_set("appendonly", "yes")
    server.client().mset({f"k:{n}": n for n in range(100)})
    backup_redis.fn(NAME)
    server.client().flushall()
    assert restore().status is Status.OK
    server.crash()
    server.start("--appendonly", "yes")
    settles(lambda: server.client().dbsize() == 100, "its data")
    server.client().config_set("appendonly", "no")
    server.client().flushall()
    assert restore().status is Status.OK
    server.crash()
    server.start("--appendonly", "no")
    settles(lambda: server.client().dbsize() == 100, "its data")


@pytest.mark.parametrize("masterauth", [True, False], ids=["masterauth", "none"])
def test_masterauth_is_as_it_was(remote: RedisServer, masterauth: bool) -> None:
    """With one, the temporary server takes it; without, it is set to a random one and emptied again."""
    backup_redis.fn(NAME)
    if not masterauth:
        remote.client().config_set("masterauth", "")
    assert restore().status is Status.OK
    assert remote.client().config_get("masterauth") == {"masterauth": PASSWORD if masterauth else ""}


@pytest.mark.parametrize("forbidden", [("-psync", "-sync"), ("-psync",)])
def test_without_psync_the_keys_are_read_one_by_one(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch, forbidden: tuple[str, ...]
) -> None:
    """That is not one moment: the report warns, and the backup restores all the same. (By SYNC alone a replica comes up
    that never says how far it is.)"""
    before = accounts(remote)
    as_user(remote, monkeypatch, *forbidden)
    report = backup_redis.fn(NAME)
    assert report.status is Status.WARN
    assert "one by one" in report.sentence()
    backup = catalogue.find_backup(DirectoryStore(remote.root / "backups"), "redis")
    assert backup.manifest.content["moment"] is False
    spoil(remote)
    restored = restore()
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}
    assert restored.status is Status.WARN, "what was kept is not of one moment either"


@pytest.mark.parametrize("forbidden", ["-replicaof", "-config"])
def test_without_replicaof_it_is_restored_key_by_key(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    before = accounts(remote)
    backup_redis.fn(NAME)
    as_user(remote, monkeypatch, forbidden)
    spoil(remote)
    remote.client().function_flush()
    remote.client().set("cache:old", 1)
    report = restore()
    assert report.status is Status.OK, report.sentence()
    assert "key by key, because" in report.facts
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}
    assert remote.client(7).dbsize() == 0
    assert remote.client().function_list()


def test_a_server_that_cannot_reach_this_host_gets_it_key_by_key(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a master again, with its old data, before anything is written."""
    before = accounts(remote)
    backup_redis.fn(NAME)
    spoil(remote)
    monkeypatch.setattr("tasks.redis.restore.network.REACH_SECONDS", 1.0)
    monkeypatch.setattr("tasks.redis.restore.network._free_port", lambda _host: 0)  # it does not listen
    report = restore()
    assert "cannot reach this host: restored key by key instead" in report.sentence()
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}
    assert remote.client().info("replication")["role"] == "master"
    assert remote.client().config_get("repl-diskless-load") == {"repl-diskless-load": "disabled"}


@pytest.mark.parametrize("command", ["info", "config|set", "eval_ro", "memory|usage", "restore"])
def test_a_forbidden_command_is_named(remote: RedisServer, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    backup_redis.fn(NAME)
    as_user(remote, monkeypatch, f"-{command}")
    remote.client().set("plain:1:0", "spoilt")
    if command == "config|set":
        report = restore()
        assert "CONFIG|SET" in report.facts["key by key, because"].upper()
        return
    assert f"forbids user ops the command {command.upper()}" in failed().sentence()
    assert remote.client().get("plain:1:0") == b"spoilt", "nothing was replaced"
    assert remote.client().info("replication")["role"] == "master"


def test_wrong_password_is_one_sentence(remote: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    backup_redis.fn(NAME)
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wr0ng")
    with pytest.raises(RunbookFailed, match="refuses the password"):
        backup_redis.fn(NAME)
    assert "refuses the password" in failed().sentence()


POINTS = (
    "network restore recorded",
    "live server follows",
    "live server loaded",
    "live server compared",
    "live server is a master again",
)


@pytest.mark.parametrize("where", POINTS)
def test_a_restore_that_is_killed_anywhere_ends_well_when_launched_again(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Launched again, `latest` is still the backup, the undo is still what was live at first."""
    before = accounts(remote)
    backup_redis.fn(NAME)
    spoil(remote)
    remote.client().config_set("masterauth", "")
    assert killed(f"redis: {where}", restoring=True) == -signal.SIGKILL
    follows = where in POINTS[1:4]
    assert remote.client().info("replication")["role"] == ("slave" if follows else "master")
    plan = restore_redis.fn(NAME)
    assert plan.status is Status.PLANNED
    assert remote.client().info("replication")["role"] == ("slave" if follows else "master"), "a plan changes nothing"
    if follows:
        with pytest.raises(RunbookFailed, match="run restore-redis again"):
            backup_redis.fn(NAME)
    report = restore()
    assert report.status is Status.WARN if where != POINTS[4] else Status.OK, report.sentence()
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}
    assert remote.client().info("replication")["role"] == "master"
    assert remote.client().config_get("masterauth") == {"masterauth": ""}
    assert remote.client().config_get("repl-diskless-load") == {"repl-diskless-load": "disabled"}
    assert not (remote.root / "reports" / RECORD).exists()
    if follows:
        undone = restore(report.facts["kept by the killed run"])
        assert undone.status is Status.OK, undone.sentence()
        assert remote.client(7).get("garbage") == b"7"


@pytest.mark.parametrize("where", ["redis: scratch replica linked", "after snapshot_over_network", "publish: sealed"])
def test_a_backup_that_is_killed_is_never_offered(remote: RedisServer, where: str) -> None:
    assert killed(where, restoring=False) == -signal.SIGKILL
    store = DirectoryStore(remote.root / "backups")
    assert catalogue.names(store, "redis") == []
    assert list(store.path.glob(".partial-*"))
    assert backup_redis.fn(NAME).status is Status.OK
    assert not list(store.path.glob(".partial-*"))


def killed(failpoint: str, *, restoring: bool) -> int:
    return exit_code_at(failpoint, lambda: restore() if restoring else backup_redis.fn(NAME))


def test_a_server_that_dies_while_it_follows(remote: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is told; started again, the next run puts it right."""
    before = accounts(remote)
    backup_redis.fn(NAME)
    spoil(remote)

    def dying(*_arguments: Any) -> Any:
        remote.crash()
        return compare_keys(*_arguments)

    replace_step(monkeypatch, network_steps, "compare_keys", dying)
    report = failed()
    assert "does not answer" in report.sentence()
    assert "may be a replica that refuses writes" in (report.state.value if report.state else "")
    monkeypatch.setattr(network_steps, "compare_keys", compare_keys)
    remote.start()
    again = restore()
    assert again.status is Status.WARN
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}


def test_a_server_that_dies_while_it_is_backed_up(remote: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    caught_up = network._caught_up

    def dying(*arguments: Any) -> Any:
        remote.crash()
        return caught_up(*arguments)

    monkeypatch.setattr(network, "_caught_up", dying)
    with pytest.raises(RunbookFailed, match="does not answer"):
        backup_redis.fn(NAME)
    assert catalogue.names(DirectoryStore(remote.root / "backups"), "redis") == []


def test_a_difference_after_replication_is_critical_and_leaves_no_replica(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeded failure: something else than the backup is there when it is compared."""
    backup_redis.fn(NAME)

    def spoiling(block: Any, scratch: Any, live: Any, order: Any, writes: Any) -> Any:
        client = remote.client()
        client.config_set("replica-read-only", "no")
        client.set("plain:1:0", "wrong")
        return compare_keys(block, scratch, live, order, writes)

    replace_step(monkeypatch, network_steps, "compare_keys", spoiling)
    report = failed()
    assert "database 0: 1 keys are different (plain:1:0)" in report.sentence()
    assert "restore-redis with backup=dump_" in report.sentence()
    assert remote.client().info("replication")["role"] == "master"


def until_sentinels_have_looked(group: Group) -> Callable[..., None]:
    """They ask the master for its replicas every ten seconds: the copy is attached until each of them has."""
    follow = network._follow

    def follow_for_long(*arguments: Any) -> None:
        follow(*arguments)
        begun = time.monotonic()

        def looked() -> bool:
            ages = [int(s.client().sentinel_master("mymaster")["info-refresh"]) for s in group.sentinels]
            return max(ages) < (time.monotonic() - begun) * 1000

        until(looked, what="a look of every Sentinel at the master", seconds=120)

    return follow_for_long


def test_without_a_fit_replica_the_sentinels_remember_the_copy_and_that_is_told(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(group, monkeypatch)
    group.master.client().set("a", 1)
    group.replicas[0].crash()
    notice_deaths(group.sentinels)
    until(
        lambda: all("s_down" in s.client().sentinel_slaves("mymaster")[0]["flags"] for s in group.sentinels),
        what="the replica to be held for dead",
        seconds=120,
    )
    monkeypatch.setattr(network, "_follow", until_sentinels_have_looked(group))
    report = backup_redis.fn(NAME)
    assert report.status is Status.WARN
    (told,) = [
        found for found in report.findings if found.name == "Sentinels that list the scratch server as a replica"
    ]
    assert told.hint.startswith("SENTINEL RESET mymaster on each of them")


def test_under_sentinel_a_replica_is_followed_and_nobody_remembers_the_copy(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a restore takes replicas and Sentinels off, and puts them back."""
    register(group, monkeypatch)
    group.master.client().mset({f"k:{n}": n for n in range(300)})
    with monkeypatch.context() as patched:
        patched.setattr(network, "_follow", until_sentinels_have_looked(group))
        report = backup_redis.fn(NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.facts["taken"] == (
        f"by replication from {group.replicas[0].address}, a replica of {group.master.address}"
    )
    assert {int(s.client().sentinel_master("mymaster")["num-slaves"]) for s in group.sentinels} == {1}
    group.master.client().flushall()
    group.master.client().set("garbage", 1)
    restored = restore()
    assert restored.status is Status.OK, restored.sentence()
    assert group.agreed_master() == group.master.address
    assert group.master.client().dbsize() == 300
    settles(lambda: group.replicas[0].client().dbsize() == 300, "the replica")
    assert group.replicas[0].client().info("replication")["master_link_status"] == "up"
    assert not (group.master.root / "reports" / DETACHED).exists()


@pytest.mark.parametrize("where", ["live server follows", "live server is a master again"])
def test_under_sentinel_a_restore_that_was_killed_ends_well(
    group: Group, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nobody knows the master then, but what was written down."""
    register(group, monkeypatch)
    group.master.client().mset({f"k:{n}": n for n in range(300)})
    backup_redis.fn(NAME)
    group.master.client().flushall()
    assert killed(f"redis: {where}", restoring=True) == -signal.SIGKILL
    assert group.agreed_master() == ""
    report = restore()
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert group.agreed_master() == group.master.address
    assert group.master.client().dbsize() == 300
    settles(lambda: group.replicas[0].client().dbsize() == 300, "the replica")
    assert not (group.master.root / "reports" / DETACHED).exists()
    assert not (group.master.root / "reports" / RECORD).exists()


def role(server: RedisServer) -> str:
    try:
        return str(server.client().info("replication")["role"])
    except redis.RedisError:
        return ""


def test_a_master_that_changes_during_the_backup(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    register(group, monkeypatch)
    group.master.client().set("a", 1)
    follow = network._follow

    def and_then_a_failover(client: redis.Redis, source: Any, host: str, port: int) -> None:
        follow(client, source, host, port)
        group.fail_over()
        until(lambda: role(group.master) == "slave", what="the old one to follow", seconds=120)

    monkeypatch.setattr(network, "_follow", and_then_a_failover)
    with pytest.raises(RunbookFailed, match="no longer the master") as failure:
        backup_redis.fn(NAME)
    assert "run it again" in failure.value.report.sentence()
    monkeypatch.setattr(network, "_follow", follow)
    again = backup_redis.fn(NAME)
    assert group.agreed_master() in again.facts["taken"]
    told = {found.name for found in again.findings if found.status is not Status.OK}
    assert told <= {"Sentinels that list the scratch server as a replica"}, (
        "the one that it followed had become the master"
    )


@pytest.mark.parametrize("forbidden", ["", "-replicaof"])
def test_what_clients_write_after_the_live_data_was_kept_is_said_to_be_lost(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    """It is neither in the backup nor in what was kept."""
    backup_redis.fn(NAME)
    if forbidden:
        as_user(remote, monkeypatch, forbidden)
    keep_live = network_steps.keep_live

    def and_a_client_writes(*arguments: Any) -> Any:
        kept = keep_live(*arguments)
        remote.client().set("plain:1:0", "a client's own")
        return kept

    monkeypatch.setattr(network_steps, "keep_live", and_a_client_writes)
    report = restore()
    assert report.status is Status.WARN, report.sentence()
    (told,) = [found for found in report.findings if found.name.endswith("are lost")]
    assert told.value.startswith("up to 1 keys")
    assert report.facts["live data kept as"] in told.hint
    assert remote.client().get("plain:1:0") != b"a client's own"


def test_what_was_restored_and_is_not_saved_is_critical(remote: RedisServer) -> None:
    """A full transfer leaves the RDB of before: a start would bring it back."""
    backup_redis.fn(NAME)
    spoil(remote)
    client = remote.client()
    (remote.data / "dump.rdb").unlink(missing_ok=True)
    (remote.data / "dump.rdb").mkdir()
    report = failed()
    (told,) = [found for found in report.findings if found.name == "the restored data is saved"]
    assert told.status is Status.CRITICAL
    assert "dump.rdb is a directory" in told.value
    assert client.info("replication")["role"] == "master"
    assert client.get("plain:1:0"), "what was restored stays"


def test_an_aof_that_can_not_be_written_anew_is_not_waited_for(
    remote: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server tries it again and again; meanwhile it is the master and serves."""
    backup_redis.fn(NAME)
    spoil(remote)
    client = remote.client()
    client.config_set("appendonly", "yes")
    until(lambda: not rewriting(client), what="the first AOF", seconds=120)
    roles, replicate = list[str](), ReplicatedRestore._replicate

    def as_where_memory_runs_out(*arguments: Any) -> Any:
        client.config_set("rdb-key-save-delay", 10_000)
        ending.enter_context(killing_children(psutil.Process(int(client.info("server")["process_id"]))))
        return replicate(*arguments)

    def serving(*arguments: Any) -> Any:
        roles.append(role(remote))
        return save_in_background(*arguments)

    monkeypatch.setattr(ReplicatedRestore, "_replicate", as_where_memory_runs_out)
    monkeypatch.setattr(network_steps, "save_in_background", serving)
    with contextlib.ExitStack() as ending:
        report = failed()
    assert "BGREWRITEAOF failed" in report.sentence()
    assert roles == ["master"]


@contextlib.contextmanager
def killing_children(process: psutil.Process) -> Iterator[None]:
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.01):
            for child in process.children():
                with contextlib.suppress(psutil.Error):
                    child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        stop.set()
        killer.join()


def rewriting(client: redis.Redis) -> bool:
    info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


@pytest.mark.parametrize("forbidden", ["-replicaof", ""])
def test_a_failover_while_the_live_data_is_kept_ends_a_restore(
    group: Group, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    """The old master takes writes for ten seconds more, and what clients write to the new one is not to be lost."""
    group.master.client().set("a", 1)
    register(group, monkeypatch)
    backup_redis.fn(NAME)
    if forbidden:
        for server in group.servers:
            as_user(server, monkeypatch, forbidden)
        register(group, monkeypatch, 'username = "ops"')
        monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "x")
    keep_live = network_steps.keep_live

    def and_then_a_failover(*arguments: Any) -> Any:
        kept = keep_live(*arguments)
        group.fail_over().client().set("new", 1)
        return kept

    monkeypatch.setattr(network_steps, "keep_live", and_then_a_failover)
    report = failed()
    assert f"{group.replicas[0].address} was promoted" in report.sentence()
    assert report.state
    assert "was not touched" in report.state.value
    assert group.agreed_master() == group.replicas[0].address
    assert group.replicas[0].client().get("new") == b"1"


def test_through_tls(remote: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch server needs no TLS of its own; the way back goes key by key, because nothing here has a certificate."""
    before = accounts(remote)
    with tls_in_front(remote, tmp_path, ["127.0.0.1"]) as (port, certificate):
        register(remote, monkeypatch, f'tls = true\ntls_ca_file = "{certificate}"')
        path = remote.root / "environment.toml"
        path.write_text(path.read_text().replace(f"port = {remote.port}", f"port = {port}"))
        report = backup_redis.fn(NAME)
        assert report.status is Status.OK, report.sentence()
        assert report.facts["taken"] == f"by replication from 127.0.0.1:{port}"
        spoil(remote)
        restored = restore()
        assert restored.status is Status.OK, restored.sentence()
    assert accounts(remote) == {number: survivors(found) for number, found in before.items()}


def test_a_certificate_of_another_name_is_refused(
    remote: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_in_front(remote, tmp_path, ["127.0.0.2"]) as (port, certificate):
        register(remote, monkeypatch, f'tls = true\ntls_ca_file = "{certificate}"')
        path = remote.root / "environment.toml"
        path.write_text(path.read_text().replace(f"port = {remote.port}", f"port = {port}"))
        with pytest.raises(RunbookFailed, match="certificate is refused"):
            backup_redis.fn(NAME)
