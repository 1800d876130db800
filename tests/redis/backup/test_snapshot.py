"""snapshot-redis and backup-redis against real servers: the end of a save is proven, and every way in which it does not
come."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest

from flows.redis.persistence import backup_redis, snapshot_redis
from flows.redis.snapshot import Kind, judge_master, judge_save, judge_standstill, seconds_of
from runbook import progress
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.redis.persistence import saving
from tasks.redis.persistence.place import inspect_place, read_place
from tasks.redis.persistence.saving import save_in_background
from tasks.redis.persistence.state import PersistenceState, read_persistence, state_of
from tasks.redis.sentinels import SentinelView, Watch
from tasks.stores.directory import DirectoryStore
from tests.redis.backup.test_persistence_check import MANUAL, child_of, fill, register
from tests.redis.servers import NAME, PASSWORD, Group, RedisServer, running_redis

KEYS = 3000
KINDS: tuple[Kind, ...] = ("bgsave", "rewrite", "save")
# Microseconds a key: a slow save of KEYS lasts minutes unless something ends it, and nothing here waits for that; one
# that is to stand still lasts seconds, so that its process is found before it has ended.
SLOW, HELD, BRIEF, QUICK = 60_000, 2_000, 500, 0
BEGUN = "redis: BGSAVE begun"
WAITS = "BGSAVE waits for the end of another save"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server with the manual's settings and some keys."""
    with running_redis(settings=MANUAL) as server:
        register(server, monkeypatch)
        fill(server, KEYS)
        yield server


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server that saves when it is told to, and has no AOF."""
    with running_redis() as server:
        register(server, monkeypatch)
        fill(server, KEYS)
        yield server


def launch(kind: Kind = "bgsave", confirm: str = "") -> Report:
    """The flow's report, however it ended."""
    try:
        return snapshot_redis.fn(NAME, kind, confirm=confirm or (NAME if kind == "save" else ""))
    except RunbookFailed as error:
        return error.report


def back_up() -> Report:
    """The report of a backup, however it ended."""
    try:
        return backup_redis.fn(NAME)
    except RunbookFailed as error:
        return error.report


def launched_again(server: RedisServer, kind: Kind) -> None:
    """It ends well, and a server that starts from its files has every key."""
    server.client().config_set("rdb-key-save-delay", QUICK)
    report = launch(kind)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    server.crash()
    server.start()
    until(lambda: server.client().dbsize() >= KEYS, what="all keys", seconds=120)


def state(server: RedisServer) -> PersistenceState:
    """Its counters."""
    return state_of(server.client().info())


def is_saving(server: RedisServer) -> bool:
    """By its temporary file: during a SAVE it answers nobody."""
    return any(server.data.glob("temp-*.*"))


def disturbed(
    server: RedisServer, work: Callable[[], object], run: Kind | Callable[[], Report] = "bgsave", delay: int = SLOW
) -> Report:
    """The flow's report, with this done in the middle of a slow save. (A server ends with the thread that started it:
    so it is the flow that has the other one.)"""
    server.client().config_set("rdb-key-save-delay", delay)
    with ThreadPoolExecutor(max_workers=1) as beside:
        running = beside.submit(run) if callable(run) else beside.submit(launch, run)
        until(lambda: is_saving(server) or running.done(), what="a save", seconds=120, every_seconds=0.01)
        work()
        return running.result()


@contextlib.contextmanager
def another_save(server: RedisServer) -> Iterator[None]:
    """Somebody else's, which stands still inside the block."""
    server.client().config_set("rdb-key-save-delay", HELD)
    server.client().bgsave()
    child = child_of(server)
    child.suspend()
    try:
        yield
    finally:
        child.resume()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Wait until a run has said something of its progress."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, logger="ops")

    def wait(text: str) -> None:
        until(lambda: text in caplog.text, what=f"the word “{text}”", seconds=120)

    return wait


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_ended_well(kept: RedisServer, kind: Kind) -> None:
    """The file is there, as new as it says; twice in a second too."""
    before, numbers = state(kept), []
    for _ in range(2):
        begun = time.time()
        report = launch(kind)
        assert report.status is Status.OK, report.sentence()
        assert "succeeded after" in report.outcome
        numbers.append(state(kept))
    first, second = numbers
    if kind == "rewrite":
        assert (first.rewrites - before.rewrites, second.rewrites - before.rewrites) == (1, 2)
        assert any("appendonly.aof.3.base.rdb" in row[0] for row in report.evidence[0].rows)
    else:
        assert before.last_save < first.last_save < second.last_save
        assert report.evidence[0].rows[0][:2] == ("dump.rdb", "RDB")
        assert (kept.data / "dump.rdb").stat().st_mtime >= begun - 0.1, "the kernel's own clock has steps"
    kept.crash()
    kept.start()
    until(lambda: kept.client().dbsize() == KEYS, what="all keys", seconds=120)


def test_save_asks_first(kept: RedisServer) -> None:
    """It serves nobody: the plan says for how long, and nothing is saved before the environment's name is typed."""
    saves = state(kept).saves
    planned = snapshot_redis.fn(NAME, "save")
    assert planned.status is Status.PLANNED
    (step,) = planned.plan_steps
    assert step.seconds > 0
    assert step.bytes > 0
    assert "no client is served" in step.detail
    with pytest.raises(NotConfirmed):
        snapshot_redis.fn(NAME, "save", confirm="yes")
    server = read_persistence(kept.block())
    assert state(kept).saves == saves
    assert seconds_of(replace(server, state=replace(server.state, save_seconds=40))) == 40
    assert seconds_of(replace(server, dataset_bytes=10**9)) == 20


def test_another_save_is_waited_for(
    kept: RedisServer, monkeypatch: pytest.MonkeyPatch, told: Callable[[str], None]
) -> None:
    """Then its own begins: two saves, not one. And it says how far it is."""
    before, own = state(kept), list[psutil.Process]()

    def hold(reached: str) -> None:
        if reached == BEGUN:
            own.append(child_of(kept))
            own[0].suspend()

    monkeypatch.setattr(saving, "failpoint", hold)
    with ThreadPoolExecutor(max_workers=1) as beside:
        with another_save(kept):
            kept.client().set("later", "than the first save's fork")
            running = beside.submit(launch)
            told(WAITS)
        try:
            told(f" of {KEYS + 1:,} keys")
        finally:
            for child in own:
                child.resume()
        report = running.result()
    assert report.status is Status.OK, report.sentence()
    after = state(kept)
    assert after.saves == before.saves + 2
    assert after.changes == 0, "the snapshot holds what was written after the other's fork"


def test_a_rewrite_waits_for_a_save(kept: RedisServer) -> None:
    kept.client().config_set("rdb-key-save-delay", BRIEF)
    kept.client().bgsave()
    kept.client().config_set("rdb-key-save-delay", QUICK)
    assert launch("rewrite").status is Status.OK
    assert (state(kept).saves, state(kept).rewrites) == (1, 1)


def test_its_process_is_killed(kept: RedisServer) -> None:
    """As where memory runs out: the server refuses writes then, and that is said first."""
    fill(kept, 1)
    assert launch().status is Status.OK
    good = (kept.data / "dump.rdb").read_bytes()
    kept.client().set("k", "v")
    report = disturbed(kept, lambda: child_of(kept).kill())
    assert report.status is Status.CRITICAL
    assert "the server now refuses writes" in report.sentence()
    assert "BGSAVE failed: its process was killed or could not be started" in report.sentence()
    assert (kept.data / "dump.rdb").read_bytes() == good
    assert not is_saving(kept), "nothing half done is left"
    launched_again(kept, "bgsave")
    kept.client().set("k", "v")


def test_a_rewrite_s_process_is_killed(kept: RedisServer) -> None:
    report = disturbed(kept, lambda: child_of(kept).kill(), "rewrite")
    assert "BGREWRITEAOF failed: its process was killed" in report.sentence()
    assert "refuses writes" not in report.sentence()
    launched_again(kept, "rewrite")


@pytest.mark.parametrize("kind", KINDS)
def test_the_directory_is_removed_in_the_middle(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """The save's last rename fails; the reason is found on the disk."""
    for delay in (BRIEF // 2, 10 * BRIEF, 100 * BRIEF):
        with running_redis(settings=MANUAL) as server:
            register(server, monkeypatch)
            fill(server, KEYS)
            report = disturbed(server, lambda of=server: shutil.rmtree(of.data), kind, delay)
            if "succeeded" in report.outcome and delay < 100 * BRIEF:
                continue  # before the removal: so short a save is missed where this process stands still
            assert report.status is Status.CRITICAL
            assert f"failed: its directory {server.data} is missing" in report.sentence()
            assert "save the data over the network" in report.findings[-1].hint
            again = launch(kind)
            assert "no save was started" in again.sentence()
            break


def test_a_directory_that_cannot_be_written(kept: RedisServer) -> None:
    """Nothing is begun: a save that fails would stop writes. The same reason is found when one has failed."""
    saves = state(kept).saves
    kept.data.chmod(0o555)
    try:
        report = launch()
        assert "cannot write to" in report.sentence()
        assert "chown" in report.sentence()
        assert state(kept).saves == saves
        server = read_persistence(kept.block())
        with pytest.raises(OpsError, match=r"BGSAVE failed: .* cannot write to"):
            save_in_background(kept.block(), server)
    finally:
        kept.data.chmod(0o755)
    launched_again(kept, "bgsave")


def test_its_file_is_a_directory(kept: RedisServer) -> None:
    (kept.data / "dump.rdb").mkdir()
    assert "dump.rdb is a directory" in launch().sentence()


def test_no_space(kept: RedisServer) -> None:
    server = read_persistence(kept.block())
    report = Report("trial", NAME)
    judge_save(report, server, replace(inspect_place(server), free_bytes=10), "bgsave")
    assert "free space for a save: 10 B" in report.sentence()


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_is_killed_in_the_middle(kept: RedisServer, kind: Kind) -> None:
    report = disturbed(kept, kept.crash, kind)
    assert report.status is Status.CRITICAL
    assert "stopped or cannot be reached during" in report.sentence()
    assert "The earlier files are untouched" in report.sentence()
    kept.start()
    until(lambda: kept.client().dbsize() >= KEYS, what="all keys", seconds=120)
    launched_again(kept, kind)


def test_the_server_is_restarted_in_the_middle(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by its supervisor: the new one's counters prove nothing."""
    monkeypatch.setattr(saving, "GONE_SECONDS", 120.0)  # so long may its start take here

    def restart() -> None:
        kept.crash()
        kept.start()

    report = disturbed(kept, restart)
    assert "was restarted during BGSAVE" in report.sentence()
    launched_again(kept, "bgsave")


def test_the_server_is_down(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [0.01] * 3)
    kept.crash()
    assert "does not answer" in launch().sentence()


def test_the_server_gives_a_save_up(unsaved: RedisServer) -> None:
    """FLUSHALL ends it and leaves the last status as it was: ok."""
    assert launch().status is Status.OK
    saves = state(unsaved).saves
    report = disturbed(unsaved, lambda: unsaved.client().flushall())
    assert state(unsaved).save_ok
    assert state(unsaved).saves == saves + 1
    assert "BGSAVE failed: the server aborted it" in report.sentence()
    assert "The old files are untouched" in report.sentence()


@pytest.mark.parametrize("rules", ["", "3600 1"])
def test_the_server_is_emptied_during_a_backup(unsaved: RedisServer, rules: str) -> None:
    """With save rules FLUSHALL writes the emptied data over the RDB, and LASTSAVE moves: that is no backup of what was
    there."""
    client = unsaved.client()
    client.config_set("save", rules)
    assert launch().status is Status.OK
    report = disturbed(unsaved, client.flushall, back_up)
    assert report.status is Status.CRITICAL
    assert "BGSAVE failed: the server aborted it: a client ran FLUSHALL" in report.sentence()
    assert ("The old files are untouched" in report.sentence()) is (not rules)
    assert not catalogue.names(DirectoryStore(unsaved.root / "backups"), "redis")


def test_a_backup_waits_for_another_save(
    kept: RedisServer, monkeypatch: pytest.MonkeyPatch, told: Callable[[str], None]
) -> None:
    """Its moment is the one before its own fork: what was written after the other's is in it."""
    ends = list[int]()
    monkeypatch.setattr(
        saving, "failpoint", lambda reached: ends.append(state(kept).last_save) if reached == BEGUN else None
    )
    with ThreadPoolExecutor(max_workers=1) as beside:
        with another_save(kept):
            kept.client().config_set("rdb-key-save-delay", QUICK)  # of the backup's own
            kept.client().set("later", "than the first save's fork")
            running = beside.submit(back_up)
            told(WAITS)
        assert running.result().status is Status.OK
    (other,) = ends
    taken = catalogue.find_backup(DirectoryStore(kept.root / "backups"), "redis").manifest
    assert taken.taken.timestamp() >= other
    assert taken.content["databases"]["0"]["all_keys"] == KEYS + 1


def test_the_aof_is_switched_off(kept: RedisServer, unsaved: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, and in the middle."""
    assert "there is no AOF to rewrite" in launch("rewrite").sentence()
    register(kept, monkeypatch)
    report = disturbed(kept, lambda: kept.client().config_set("appendonly", "no"), "rewrite")
    assert "the AOF was switched off meanwhile" in report.sentence()


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_killed(kept: RedisServer, kind: Kind) -> None:
    """kill -9 with the save begun: the server ends it by itself, and the next run begins its own behind it."""
    kept.client().config_set("rdb-key-save-delay", BRIEF)
    command = {"bgsave": "BGSAVE", "rewrite": "BGREWRITEAOF", "save": "SAVE"}[kind]
    child = os.fork()
    if child == 0:
        os.environ["OPS_FAILPOINT"] = f"redis: {command} begun"
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            launch(kind)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    launched_again(kept, kind)


def test_it_becomes_a_replica_in_the_middle(kept: RedisServer) -> None:
    report = disturbed(kept, lambda: kept.client().replicaof("127.0.0.1", 1))
    assert report.status is Status.CRITICAL
    assert "was made a replica of 127.0.0.1:1 during BGSAVE" in report.sentence()
    assert "it finds the new master" in report.sentence()
    kept.client().replicaof("NO", "ONE")
    child_of(kept).kill()  # its save goes on
    launched_again(kept, "bgsave")


def test_the_master_changes(group: Group) -> None:
    """Afterwards, and before the old one knows: it is said. The next run saves the new one's data."""
    fill(group.master, KEYS)
    report = Report("trial", NAME)
    judge_master(report, read_persistence(group.master.block()), Watch((SentinelView("a:1", master="b:2"),)))
    assert "the master changed meanwhile: b:2" in report.sentence()
    new = group.lose_master()
    report = launch()
    assert report.facts["server"].startswith(f"{new.address} (master")
    assert report.status is Status.OK, report.sentence()
    assert (new.data / "dump.rdb").stat().st_size > KEYS


def test_save_is_shorter_than_the_sentinels_patience(group: Group) -> None:
    """Else they would fail over a server that only saves."""
    server = read_persistence(group.master.block())
    watch = Watch((SentinelView("a:1", master=server.address, settings={"down-after-milliseconds": 500}),))
    for seconds, status in ((0, Status.OK), (1, Status.CRITICAL)):
        report = Report("trial", NAME)
        judge_standstill(report, replace(server, state=replace(server.state, save_seconds=seconds)), watch)
        assert report.status is status
    report = snapshot_redis.fn(NAME, "save")
    assert [f.name for f in report.findings if f.name == "SAVE ends before a failover"]
    assert "1 replicas wait too" in report.plan_steps[0].detail


def test_its_files_are_elsewhere(kept: RedisServer) -> None:
    """What cannot be measured is a warning; the reason of a failure is then in the server's log."""
    server = replace(read_persistence(kept.block()), process=2**22 + 1)
    report = Report("trial", NAME)
    judge_save(report, server, read_place(server), "bgsave")
    assert report.status is Status.WARN
    assert "not measured" in report.sentence()
    kept.data.chmod(0o555)
    with pytest.raises(OpsError, match=r"is not on this host\) — check the server's log"):
        save_in_background(kept.block(), server)
    kept.data.chmod(0o755)


def test_wrong_password(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "wr0ng")
    assert "refuses the password" in launch().sentence()


def test_a_backup_by_a_user_without_bgsave(kept: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: nobody waits an hour for the end of a save that is not there."""
    register(kept, monkeypatch, username="ops")
    allowed = ["+info", "+client", "+time", "+config|get"]
    kept.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=allowed)
    told = back_up().sentence()
    assert "forbids user ops the command BGSAVE" in told
    assert "ACL SETUSER ops +bgsave" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_without_the_command(kept: RedisServer, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """At once, not after waiting for another save."""
    register(kept, monkeypatch, username="ops")
    usual = ["+info", "+client", "+time", "+config|get"]
    kept.client().acl_setuser("ops", enabled=True, passwords=[f"+{PASSWORD}"], commands=usual)
    command = {"bgsave": "BGSAVE", "rewrite": "BGREWRITEAOF", "save": "SAVE"}[kind]
    told = launch(kind).sentence()
    assert f"forbids user ops the command {command}" in told
    assert f"ACL SETUSER ops +{command.lower()}" in told
