"""Backups of the AOF: its parts, with rewrites off, and the RDB of what they hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from flows.redis import backup as keeping
from flows.redis import backup as taking
from flows.redis.backup import Form
from flows.redis.persistence import backup_redis, restore_redis
from runbook.errors import RunbookFailed
from runbook.files.record import write
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.redis.backup import live_aof as aof_backup
from tasks.redis.backup.aof import copy_aof, cut_bytes, loaded_aof, read_aof
from tasks.redis.backup.live_aof import RECORD, REWRITES, Rewrites
from tasks.redis.backup.snapshot import RDB
from tasks.redis.restore.network import RECORD as NETWORK_RECORD
from tasks.redis.restore.network import RedisLeftover
from tasks.stores.directory import DirectoryStore
from tests.redis.conftest import NAME, Rig
from tests.redis.data import account, add_short, fill, survivors
from tests.redis.servers import Group, RedisServer


def newest(rig: Rig) -> Backup:
    return catalogue.find_backup(DirectoryStore(rig.store), "redis")


def rewrites(rig: Rig) -> str:
    return str(rig.client().config_get(REWRITES)[REWRITES])


def backup() -> Report:
    report = backup_redis.fn(NAME, "aof")
    assert report.status is Status.OK, report.sentence()
    return report


def test_round_trip(rig: Rig) -> None:
    """Types and times of several databases; what expired meanwhile; the configuration is as it was."""
    clients = {number: rig.client(number) for number in (0, 3)}
    fill(clients)
    ends = add_short(clients, 1000)
    before = {number: account(client) for number, client in clients.items()}
    report = backup()
    assert rewrites(rig) == "100"
    assert "files" in report.facts["AOF"]
    for client in clients.values():
        client.flushdb()
    restored = restore_redis.fn(NAME, confirm=NAME)
    assert restored.status is Status.OK, restored.sentence()
    until(lambda: time.time() > ends, what="the end of the short keys", seconds=120)
    assert {number: account(rig.client(number)) for number in clients} == {
        number: survivors(keys) for number, keys in before.items()
    }


def test_the_aof_itself_restores_too(rig: Rig) -> None:
    """By its path, where its RDB is lost: unproven then."""
    fill({0: rig.client()})
    before = account(rig.client())
    backup()
    path = newest(rig).path
    (path / RDB).unlink()
    rig.client().flushall()
    report = restore_redis.fn(NAME, str(path / "appendonlydir"), confirm=NAME)
    assert report.status is Status.WARN, report.sentence()
    assert account(rig.client()) == survivors(before)


def test_an_aof_of_our_own_that_was_altered_is_refused(rig: Rig) -> None:
    """It would load: a value is another one."""
    rig.client().set("k", "value-1234")
    backup()
    path = newest(rig).path
    part = next(one for one in (path / "appendonlydir").iterdir() if b"value-1234" in one.read_bytes())
    part.write_bytes(part.read_bytes().replace(b"value-1234", b"value-1235"))
    started = rig.run_id()
    with pytest.raises(RunbookFailed, match=part.name):
        restore_redis.fn(NAME, str(path / "appendonlydir"), confirm=NAME)
    assert rig.run_id() == started


def test_transactions_are_whole_and_what_was_acknowledged_is_there(rig: Rig) -> None:
    """Copied while clients write without a pause: both counters of a transaction agree, in the AOF and in its RDB."""
    stop, acknowledged = threading.Event(), [0]

    def write() -> None:
        client, n = rig.client(), 0
        while not stop.is_set():
            n += 1
            with contextlib.suppress(redis.RedisError), client.pipeline(transaction=True) as pipe:
                pipe.incr("one")
                pipe.set("padding", "x" * 3000)
                pipe.incr("two")
                pipe.execute()
                acknowledged[0] = n

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: acknowledged[0] > 100, what="some writes", seconds=120)
        for _ in range(3):
            before = acknowledged[0]
            backup()
            found = newest(rig)
            with _loaded(rig, found.path / "appendonlydir") as (counters, cut):
                assert counters[0] == counters[1] >= before
                assert cut == 0, "the copy ends with a whole transaction"
    finally:
        stop.set()
        writer.join()
    restored = restore_redis.fn(NAME, confirm=NAME)
    assert restored.status is Status.OK, restored.sentence()
    assert rig.client().mget("one", "two") == [str(counters[0]).encode()] * 2


@contextlib.contextmanager
def _loaded(rig: Rig, path: Path) -> Any:
    place = rig.root / "loaded"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    aof = read_aof(path)
    copy_aof(aof, place)
    with loaded_aof(rig.environment.redis, place, RDB) as client:
        yield [int(value or 0) for value in client.mget("one", "two")], cut_bytes(client, aof)


def test_a_half_transaction_at_the_end_is_left_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded tail: a copy that ends within MULTI … EXEC holds nothing of it."""
    rig.client().set("a", 1)
    copied = aof_backup.copy_aof

    def with_a_tail(aof: Any, directory: Path) -> None:
        copied(aof, directory)
        last = max((directory / "appendonlydir").glob("*.incr.aof"))
        last.write_bytes(last.read_bytes() + b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$1\r\n1\r\n")

    monkeypatch.setattr(aof_backup, "copy_aof", with_a_tail)
    backup()
    with _loaded(rig, newest(rig).path / "appendonlydir") as (_, cut):
        assert cut == 0
    rig.client().flushall()
    restore_redis.fn(NAME, confirm=NAME)
    assert rig.client().keys("*") == [b"a"]


def test_an_rdb_that_is_not_what_the_aof_holds_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded failure of the proof."""
    fill({0: rig.client()})
    read = aof_backup.manifest_of

    def of_something_else(block: Any, directory: Path) -> Any:
        found = read(block, directory)
        return found.model_copy(update={"functions": {}})

    monkeypatch.setattr(aof_backup, "manifest_of", of_something_else)
    with pytest.raises(RunbookFailed, match="the RDB differs from the AOF that it was made from"):
        backup_redis.fn(NAME, "aof")
    assert catalogue.names(DirectoryStore(rig.store), "redis") == []
    assert rewrites(rig) == "100"


def test_somebody_rewrites_the_aof_during_the_copy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied again."""
    fill({0: rig.client()})
    copied, count = aof_backup.copy_aof, [0]

    def and_a_rewrite(aof: Any, directory: Path) -> None:
        copied(aof, directory)
        count[0] += 1
        if count[0] == 1:
            rig.client().bgrewriteaof()
            until(lambda: not rig.client().info("persistence")["aof_rewrite_in_progress"], what="it", seconds=120)

    monkeypatch.setattr(aof_backup, "copy_aof", and_a_rewrite)
    backup()
    assert count[0] == 2
    names = sorted(path.name for path in (newest(rig).path / "appendonlydir").iterdir())
    assert [name for name in names if ".2." in name], names


@pytest.mark.parametrize("rig", [False], indirect=True)
def test_without_an_aof_it_is_refused(rig: Rig) -> None:
    rig.client().set("a", 1)
    with pytest.raises(RunbookFailed, match="the AOF is off") as failure:
        backup_redis.fn(NAME, "aof")
    assert "CONFIG SET appendonly yes" in failure.value.report.sentence()


def test_files_that_are_elsewhere_are_refused(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client().config_set("appendonly", "yes")
    server.register(monkeypatch, extra="remote = true")
    with pytest.raises(RunbookFailed, match="kind=rdb"):
        backup_redis.fn(NAME, "aof")
    server.register(monkeypatch)
    server.client().config_set("appendonly", "yes")
    folder = server.data / "appendonlydir"

    def is_rewritten() -> bool:
        info = server.client().info("persistence")
        return (
            not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"] and any(folder.glob("*.manifest"))
        )

    until(is_rewritten, what="the first AOF", seconds=120)
    for manifest in folder.glob("*.manifest"):
        manifest.unlink()
    with pytest.raises(RunbookFailed, match="not on this host"):
        backup_redis.fn(NAME, "aof")
    assert server.client().config_get(REWRITES) == {REWRITES: "100"}


def test_a_user_who_may_not_set_it_is_told(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client().config_set("appendonly", "yes")
    rules = ["+@all", "-config|set"]
    server.client().acl_setuser("ops", enabled=True, passwords=["+x"], keys=["*"], channels=["*"], commands=rules)
    server.register(monkeypatch, extra='username = "ops"')
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "x")
    with pytest.raises(RunbookFailed, match=r"forbids user ops the command CONFIG\|SET"):
        backup_redis.fn(NAME, "aof")


@pytest.mark.parametrize(
    "where", ["redis: aof rewrites recorded", "redis: aof rewrites off", "redis: aof copied", "publish: sealed"]
)
@pytest.mark.parametrize("again", ["aof", "rdb"])
def test_killed_anywhere_rewrites_are_put_back_by_the_next_run(rig: Rig, where: str, again: str) -> None:
    fill({0: rig.client()})
    before = account(rig.client())
    assert _killed(where) == -signal.SIGKILL
    left = where in ("redis: aof rewrites recorded", "redis: aof rewrites off")
    assert rewrites(rig) == ("0" if where == "redis: aof rewrites off" else "100")
    assert (rig.root / "reports" / RECORD).exists() == left
    assert catalogue.names(DirectoryStore(rig.store), "redis") == []
    report = backup_redis.fn(NAME, again)
    assert report.status is Status.OK, report.sentence()
    assert ("AOF rewrites" in report.facts) == (where == "redis: aof rewrites off")
    assert rewrites(rig) == "100"
    assert not (rig.root / "reports" / RECORD).exists()
    rig.client().flushall()
    assert restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    assert account(rig.client()) == survivors(before)


def _killed(failpoint: str) -> int:
    child = os.fork()
    if child == 0:
        os.environ["OPS_FAILPOINT"] = failpoint
        with contextlib.suppress(BaseException), Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            backup_redis.fn(NAME, "aof")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_server_that_dies_during_the_copy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle: said so; what it was set to is written down, and put back once it is there again."""
    fill({0: rig.client()})
    copied = aof_backup.copy_aof

    def and_dies(aof: Any, directory: Path) -> None:
        copied(aof, directory)
        rig.services.stop("redis")

    monkeypatch.setattr(aof_backup, "copy_aof", and_dies)
    with pytest.raises(RunbookFailed, match="does not answer"):
        backup_redis.fn(NAME, "aof")
    assert (rig.root / "reports" / RECORD).exists()
    rig.services.start("redis")
    rig.wait()
    monkeypatch.setattr(aof_backup, "copy_aof", copied)
    assert backup().status is Status.OK
    assert not (rig.root / "reports" / RECORD).exists()


@pytest.mark.parametrize("kind", ["rdb", "aof"])
def test_a_backup_of_a_master_that_was_replaced_meanwhile_is_none(
    group: Group, monkeypatch: pytest.MonkeyPatch, kind: Form
) -> None:
    """What clients wrote to the new one is not in it; it is never offered for a restore."""
    group.master.client().config_set("appendonly", "yes")
    until(lambda: not aof_backup._rewriting(group.master.block()), what="the first AOF", seconds=120)
    where, name = (taking, "snapshot") if kind == "rdb" else (keeping, "snapshot_aof")
    real = getattr(where, name)

    def and_then_a_failover(*arguments: Any) -> Any:
        done = real(*arguments)
        group.fail_over().client().set("new", 1)
        return done

    monkeypatch.setattr(where, name, and_then_a_failover)
    with pytest.raises(RunbookFailed, match="is no longer the master"):
        backup_redis.fn(NAME, kind)
    assert catalogue.names(DirectoryStore(group.master.root / "backups"), "redis") == []


@pytest.mark.parametrize("record", [RECORD, NETWORK_RECORD])
def test_what_a_killed_run_left_on_a_server_that_died_is_no_reason_to_take_no_backup(group: Group, record: str) -> None:
    group.master.client().set("a", 1)
    reports = group.master.root / "reports"
    reports.mkdir()
    left = (
        Rewrites(group.master.address, "100")
        if record == RECORD
        else RedisLeftover(group.master.address, "x:1", {}, "")
    )
    write(reports / record, left)
    group.lose_master()
    report = backup_redis.fn(NAME)
    assert report.status is Status.WARN
    assert [found.value for found in report.findings if "killed" in found.name] == [
        f"Redis at {group.master.address} does not answer"
    ]
    assert (reports / record).exists()
    if record == RECORD:
        with pytest.raises(RunbookFailed, match="Until then use kind=rdb"):
            backup_redis.fn(NAME, "aof")
