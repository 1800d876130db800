"""Restores that are refused, that are killed, and that run while clients write."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from flows.redis.persistence import backup_redis, restore_redis
from lab.processes import write
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.guard.permit import Act, Permit
from runbook.kinds import permitted_by
from runbook.report import Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.redis.content.manifest import EXPIRING, RedisContent, compare
from tasks.redis.content.reading import read_content
from tasks.redis.restore.copy import ACT, build_redis_copy
from tasks.redis.restore.fitness import judge_redis_backup
from tasks.redis.scratch import scratch_server
from tasks.redis.topology.topology import ReplicationTopology
from tasks.stores.directory import DirectoryStore
from tests.fixtures.killed import exit_code_at
from tests.fixtures.reports import bad
from tests.redis.conftest import NAME, Rig
from tests.redis.data import account, fill, survivors

ALONE = ReplicationTopology(own="127.0.0.1:6379")
PLAIN = ("find_backup", "verify_files", "mark_verified", "judge_redis_backup")


def test_permit_is_needed(rig: Rig) -> None:
    """A wrong confirm and a permit for something else change nothing."""
    rig.client().set("a", 1)
    backup_redis.fn(NAME)
    with pytest.raises(NotConfirmed):
        restore_redis.fn(NAME, "latest", confirm="production")
    found = catalogue.find_backup(DirectoryStore(rig.store), "redis")
    build = build_redis_copy.bind(rig.environment.redis, found)
    with pytest.raises(NotConfirmed, match="not carried out by a plan"):
        build()
    with permitted_by(Permit(NAME, (Act(ACT, "/elsewhere"),))), pytest.raises(NotConfirmed, match="not in this run's"):
        build()
    assert [path.name for path in rig.data.parent.iterdir()] == ["data"]


def test_other_obstacles(rig: Rig) -> None:
    """A configuration of another directory, of a replica, a missing program: each in words."""
    rig.client().set("a", 1)
    backup_redis.fn(NAME)
    found, block = catalogue.find_backup(DirectoryStore(rig.store), "redis"), rig.environment.redis
    for extra, told in (
        ("replicaof 10.0.0.1 6379\n", "replica of 10.0.0.1 6379"),
        ("dir /var/lib/other\n", "says dir /var/lib/other"),
        ("aclfile users.acl\n", "ACL file users.acl is missing"),
        ("cluster-enabled yes\n", "node of a cluster"),
        ("requirepass other\n", "could not be verified"),
    ):
        rig.configure(aof=True, extra=extra)
        assert told in "; ".join(judge_redis_backup(block, found, ALONE).problems)
    rig.configure(aof=True)
    missing = block.model_copy(update={"server_program": "/nowhere/valkey-server", "config_file": "/nowhere/x"})
    problems = "; ".join(judge_redis_backup(missing, found, ALONE).problems)
    assert "/nowhere/valkey-server" in problems
    assert "/nowhere/x cannot be read" in problems


def test_more_databases_than_the_configuration_has(rig: Rig) -> None:
    """The server would end at its start, over and over; the scratch server has 1024."""
    for number in (0, 9):
        rig.client(number).set("a", number)
    backup_redis.fn(NAME)
    rig.configure(aof=True, extra="databases 8\n")
    run_id = rig.run_id()
    with pytest.raises(RunbookFailed, match="the backup has database 9, and the configuration 8 databases"):
        restore_redis.fn(NAME, confirm=NAME)
    assert rig.run_id() == run_id


def test_more_memory_than_the_configuration_allows(rig: Rig) -> None:
    """Half of the keys would be evicted at the first command."""
    rig.client().mset({f"session:{n}": "x" * 200 for n in range(20_000)})
    backup_redis.fn(NAME)
    rig.configure(aof=True, extra="maxmemory 4mb\nmaxmemory-policy allkeys-lru\n")
    run_id = rig.run_id()
    with pytest.raises(OpsError, match="maxmemory is 4.2 MB: keys would be evicted"):
        restore_redis.fn(NAME, confirm=NAME)
    assert (rig.run_id(), rig.client().dbsize()) == (run_id, 20_000)
    rig.configure(aof=True, extra="maxmemory 40mb\nmaxmemory-policy allkeys-lru\n")
    report = restore_redis.fn(NAME, confirm=NAME)
    assert [*bad(report)] == ["Redis: settings after the start"], "the start applies what was only written"
    assert [measure.what for measure in report.measures] == ["redis backup"]


def test_a_user_with_a_password_of_its_own(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """requirepass is the default user's."""
    rig.configure(aof=True, extra="user ops on >another ~* &* +@all\n")
    rig.client().acl_setuser(
        "ops", enabled=True, passwords=["+another"], keys=["*"], channels=["*"], commands=["+@all"]
    )
    monkeypatch.setenv("OPS_TEST_REDIS_PASSWORD", "another")
    rig.client().set("a", 1)
    plain = rig.toml.read_text()
    write(rig.toml, plain.replace("[redis]\n", '[redis]\nusername = "ops"\n'), 0o644)
    try:
        backup_redis.fn(NAME)
        assert restore_redis.fn(NAME, confirm=NAME).status is Status.OK
    finally:
        write(rig.toml, plain, 0o644)


def _killed(failpoint: str, flow: str) -> int:
    """Run a flow in a child that dies at a failpoint; returns how it ended."""
    return exit_code_at(
        failpoint,
        lambda: restore_redis.fn(NAME, "latest", confirm=NAME) if flow == "restore" else backup_redis.fn(NAME),
    )


def _reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: str) -> list[str]:
    log = tmp_path / flow
    monkeypatch.setenv("OPS_FAILPOINT_LOG", str(log))
    assert _killed("", flow) == 0
    monkeypatch.delenv("OPS_FAILPOINT_LOG")
    names = dict.fromkeys(log.read_text().splitlines())
    # “after A” is the state of “before B”, but for the last.
    return [name for name in names if not name.endswith(PLAIN) and not name.startswith("after ")]


def test_killed_anywhere(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at every boundary of a restore; launched again, it ends well, and no data was lost in between."""
    fill({0: rig.client()})
    before = account(rig.client())
    backup_redis.fn(NAME)
    names = _reached(tmp_path, monkeypatch, "restore")
    assert {"redis: before first rename", "redis: between renames", "redis: after second rename"} <= {*names}
    for name in names:
        rig.client().set("garbage", name)
        assert _killed(name, "restore") == -signal.SIGKILL, name
        whole = [p for p in rig.data.parent.iterdir() if (p / "aof files").exists() and ".restoring" not in p.name]
        assert whole, "neither live nor kept data"
        report = restore_redis.fn(NAME, "latest", confirm=NAME)
        assert report.status is Status.OK, f"{name}: {report.sentence()}"
        assert account(rig.client()) == survivors(before), name
        assert not list(rig.data.parent.glob("*.restoring"))


def test_killed_backup_is_never_offered(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at every boundary of a backup."""
    fill({0: rig.client()})
    names = _reached(tmp_path, monkeypatch, "backup")
    for name in names:
        published = catalogue.names(DirectoryStore(rig.store), "redis")
        assert _killed(name, "backup") == -signal.SIGKILL, name
        assert catalogue.names(DirectoryStore(rig.store), "redis") == published
    left = list(rig.store.glob(".partial-*"))
    report = backup_redis.fn(NAME)
    assert report.status is Status.OK
    assert left
    assert not list(rig.store.glob(".partial-*"))


@contextlib.contextmanager
def writing(rig: Rig) -> Iterator[list[int]]:
    """Clients that write, expire, and delete without a pause; their count of writes."""
    stop, written = threading.Event(), [0]

    def work(seed: int) -> None:
        client, n = rig.client(), seed
        while not stop.wait(0.01):
            n += 2
            with contextlib.suppress(redis.RedisError), client.pipeline(transaction=False) as pipe:
                for m in range(20):
                    pipe.set(f"w:{n}:{m}", n, px=200 + n % 3000)
                    pipe.incr(f"counter:{m}")
                    pipe.rpush("work", n)
                    pipe.set(f"kept:{n % 5000}:{m}", n)
                pipe.delete(f"kept:{(n - 500) % 5000}:3")
                pipe.lpop("work", 10)
                pipe.hset(f"h:{n % 50}", "f", n)
                pipe.execute_command("HPEXPIRE", f"h:{n % 50}", 300, "FIELDS", 1, "f")
                pipe.execute()
                written[0] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def zombies() -> list[psutil.Process]:
    """A server collects the process that saved for it a moment after its end."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if process.status() == psutil.STATUS_ZOMBIE else []
    return found


POPULATE = """
for n = 0, 199999 do
  if n % 2 == 0 then redis.call('SET', 'session:' .. n, 'user ' .. n)
  else redis.call('SET', 'session:' .. n, 'user ' .. n, 'PX', 3000 + math.floor(n / 10)) end
end
"""


def test_no_false_alarm_under_write_load(rig: Rig, tmp_path: Path) -> None:
    """200,000 keys, clients that write and reconnect: every verification passes, in backups and in restores."""
    rig.client().eval(POPULATE, 0)
    block = rig.environment.redis
    with writing(rig) as written:
        for number in range(3):
            report = backup_redis.fn(NAME)
            assert report.status is Status.OK, report.sentence()
            found = catalogue.find_backup(DirectoryStore(rig.store), "redis")
            expected = RedisContent.model_validate(found.manifest.content)
            with scratch_server(block, found.path) as client:
                actual = read_content(client, tmp_path / str(number))
            comparison = compare(expected, found.path / EXPIRING, actual, tmp_path / str(number))
            assert comparison.is_equal, comparison.differences
        before = written[0]
        report = restore_redis.fn(NAME, "latest", confirm=NAME)
        assert report.status is Status.OK, report.sentence()
        until(lambda: written[0] > before, what="clients writing again", seconds=120)
    assert expected.all_keys > 100_000
    assert written[0] > 100
    until(lambda: not zombies(), what="the end of what was started", seconds=120)
