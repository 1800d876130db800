"""A dead master's data, taken from what survives: its replica, or its own files. A deletion is not taken silently."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore import sources
from runbook.current import use_report
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue
from tasks.backups.catalogue import Backup
from tasks.redis.restore.serving import find_change
from tasks.redis.restore.survivors import SurvivingCopy, Survivors
from tasks.redis.server import holders, live_directory
from tasks.redis.topology.topology import find_record, read_topology
from tests.fixtures.killed import exit_code_at
from tests.fixtures.reports import finding
from tests.redis.conftest import Rig
from tests.redis.data import account, fill, survivors
from tests.redis.servers import NAME, RedisServer, settles


def in_step(rig: Rig, replica: RedisServer) -> None:
    """The replica has all that the master has acknowledged."""
    sent = rig.client().info("replication")["master_repl_offset"]
    settles(lambda: replica.client().info("replication").get("slave_repl_offset", -1) >= sent, "the replica")


def die(rig: Rig, replica: RedisServer, *, files: bool = False, step: bool = True) -> None:
    """The master is killed with -9 and not started again; its directory is removed, or (`files`) stays. `step`: the
    replica has all of its writes."""
    if step:
        in_step(rig, replica)
    rig.crash()
    if not files:
        shutil.rmtree(rig.data)
    block = rig.environment.redis  # a child that saves outlives its server
    until(lambda: not holders(block, live_directory(block)), what="the end of the last process there", seconds=30)
    settles(lambda: replica.client().info("replication")["master_link_status"] == "down", "the end of the link")


def choice(rig: Rig, **named: object) -> tuple[SurvivingCopy | None, Survivors, Report]:
    """What full-restore chooses now."""
    env, report = rig.environment, Report("trial", NAME)
    with use_report(report):
        around = read_topology(env.redis, env.reports_directory)
        found = sources.find(report, env, around)
        wanted, backup = named.pop("wanted", "auto"), newest(rig) if named.pop("backup", True) else None
        chosen = sources.choose(report, env, found, around, backup, wanted, **{"latest": True} | named)  # type: ignore[arg-type]
    return chosen, found, report


def newest(rig: Rig) -> Backup:
    return catalogue.find_backup(sources.stores.store_for(rig.environment, "redis"), "redis", "latest", NAME)


def killed(point: str) -> int:
    return exit_code_at(point, lambda: restore_redis.fn(NAME, redis_source="replica", confirm=NAME))


def test_nothing_is_lost_if_a_replica_survives(rig: Rig, replica: RedisServer) -> None:
    """Master and directory are lost, with writes that no backup has. Killed on the way, the restore is run again."""
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    for number in range(300):
        rig.client().set(f"since:{number}", number)
    before = account(rig.client())
    die(rig, replica)

    chosen, _, report = choice(rig)
    assert chosen
    assert (chosen.kind, chosen.where, chosen.problem) == ("replica", replica.address, "")
    assert chosen.all_keys == len(before)
    assert chosen.loss.at_most
    assert chosen.loss.since == newest(rig).manifest.taken, "the last moment at which the master's offset was recorded"
    assert choice(rig, latest=False)[0] is None, "a named backup is a point in time"
    planned = restore_redis.fn(NAME)
    assert "redis_source=replica" in finding(planned, "a surviving copy loses less than the backup").hint
    for point in ("redis: survivor released", "redis: surviving data captured"):
        assert killed(point) == -signal.SIGKILL
        assert find_record(rig.root / "reports"), "the replica is detached, and keeps its data"
        assert choice(rig)[0] is not None
    report = restore_redis.fn(NAME, redis_source="replica", confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert account(rig.client()) == survivors(before)
    assert rig.client().info("replication")["role"] == "master"
    until(lambda: account(replica.client()) == account(rig.client()), what="the replica's data", seconds=60)
    assert newest(rig).name != report.facts["live data kept as"], "latest never means the captured data"
    assert find_record(rig.root / "reports") is None


def test_the_dead_masters_own_files_lose_nothing(rig: Rig, replica: RedisServer) -> None:
    """Its AOF has what it acknowledged before the kill; it is chosen before the replica, which may have less."""
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    rig.client().set("since", 1)
    before = account(rig.client())
    die(rig, replica, files=True)
    chosen, found, _ = choice(rig)
    assert chosen
    assert (chosen.kind, chosen.all_keys) == ("files", len(before))
    assert not any(copy.problem for copy in found.copies)
    report = restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert account(rig.client()) == survivors(before)

    assert choice(rig, wanted="files")[0], "a person may have its files proven and restored"


def test_a_master_that_serves_all_of_its_data_is_kept(rig: Rig, replica: RedisServer) -> None:
    """Not one from which a command deleted most keys, nor one that restarted without its data, though clients have
    written as many keys since."""
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    kept, found, report = choice(rig)
    assert kept
    assert (kept.kind, kept.where, kept.run_id) == ("live", f"127.0.0.1:{rig.port}", rig.run_id())
    assert kept is found.serving
    assert "kept as it serves" in report.facts["redis source"]
    assert kept.loss.is_none
    assert find_change.work(rig.environment.redis, kept) == ""
    assert choice(rig, latest=False)[0] is None, "a named backup is a point in time"
    damaged, _, report = choice(rig, damaged=True)
    assert damaged is None
    assert "is damaged" in report.facts["redis source"]

    rig.services.stop("redis")
    rig.services.start("redis")
    rig.wait()
    again, _, _ = choice(rig)
    assert again
    assert again.kind == "live", "it loaded its data at its start"
    assert "restarted during this run" in find_change.work(rig.environment.redis, kept)

    keys = int(rig.client().dbsize())
    rig.services.stop("redis")
    shutil.rmtree(rig.data)
    rig.account.directory(rig.data, 0o700)
    rig.services.start("redis")
    rig.wait()
    settles(lambda: replica.client().dbsize() == 0, "the replica of an empty master")
    assert choice(rig)[0] is None, "it is empty"
    rig.client().mset({f"new:{number}": 1 for number in range(keys)})
    chosen, _, report = choice(rig)
    assert chosen is None
    assert "has restarted since the backup, and has 0 of " in finding(report, "Redis serves incomplete data").value
    assert "redis_source=live keeps them" in report.facts["redis source"]
    named, _, _ = choice(rig, wanted="live")
    assert named


@pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHALL, then as many new keys", "DEL"])
def test_a_serving_master_after_a_deletion_is_not_kept(rig: Rig, command: str) -> None:
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    keys = [key for number, key in enumerate(rig.client().keys()) if number % 5]
    rig.client().delete(*keys) if command == "DEL" else rig.client().flushall()
    new = len(keys) * 2 if "new keys" in command else 1
    rig.client().mset({f"since:{number}": 1 for number in range(new)})
    chosen, _, report = choice(rig)
    assert chosen is None
    if new > 1:
        told = finding(report, "Redis serves incomplete data").value
        assert told.startswith("FLUSHALL or FLUSHDB ran 1 times since its start, and has 0 of ")
        return
    assert "should still exist" in report.facts["redis source"]
    assert "redis_source=live" in finding(report, f"Redis data was deleted: files in {rig.data}").hint


@pytest.mark.parametrize("command", ["FLUSHALL", "DEL"])
def test_a_deletion_that_the_replica_followed_needs_a_word(rig: Rig, replica: RedisServer, command: str) -> None:
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    if command == "FLUSHALL":
        rig.client().flushall()
    else:
        rig.client().delete(*[key for number, key in enumerate(rig.client().keys()) if number % 5])
    die(rig, replica, files=True)
    chosen, found, report = choice(rig)
    assert chosen is None, "the backup"
    assert len(found.copies) == 2
    for copy in found.copies:
        told = finding(report, f"Redis data was deleted: {copy.name}")
        assert told.status is Status.WARN
        assert "should still exist" in told.value
        assert "50%" in told.expected
    if command == "FLUSHALL":
        assert (
            "FLUSHALL or FLUSHDB ran 1 times"
            in finding(report, f"Redis data was deleted: {found.copies[0].name}").value
        )
        with pytest.raises(RunbookFailed, match="it is empty"):
            choice(rig, wanted="replica")
        return
    asked, _, _ = choice(rig, wanted="replica")
    assert asked
    assert asked.where == replica.address


def test_what_is_incomplete_or_of_unknown_loss_is_no_source(rig: Rig, replica: RedisServer, tmp_path: Path) -> None:
    """A replica in a full resynchronisation, and one that has restarted since it heard its master."""
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    in_step(rig, replica)
    rig.client().config_set("rdb-key-save-delay", 1_000_000)  # microseconds for each key
    replica.client().execute_command("REPLICAOF", "NO", "ONE")
    replica.client().set("of another stream", 1)
    replica.client().execute_command("REPLICAOF", "127.0.0.1", rig.port)
    settles(lambda: replica.client().info("replication")["master_sync_in_progress"] == 1, "the resynchronisation")
    _, found, _ = choice(rig)
    assert "full resynchronisation" in found.copies[0].problem
    assert found.not_yet == found.copies[:1], "it will be complete: wait for it"
    with pytest.raises(RunbookFailed, match="full resynchronisation"):
        choice(rig, wanted="replica")

    replica.client().save()
    die(rig, replica, step=False)
    replica.stop()
    replica.start()
    with pytest.raises(RunbookFailed, match="redis_source=replica to restore from it, or with redis_source=backup"):
        choice(rig)
    assert choice(rig, wanted="backup")[0] is None
    named, _, _ = choice(rig, wanted="replica")
    assert named
    assert "no recorded offset" in named.loss.unknown


def test_a_killed_runs_decision_is_kept(rig: Rig, replica: RedisServer) -> None:
    """Its stop of the master must not look like the master's death: the data may have been replaced for a reason."""
    fill({0: rig.client()})
    backup_redis.fn(NAME)
    env = rig.environment
    child = os.fork()
    if child == 0:
        with sources.remembered(env, None, []):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    die(rig, replica, files=True)
    chosen, _, report = choice(rig)
    assert chosen is None
    assert "redis_source=backup" in report.facts["decision of a killed run"]
    with sources.remembered(env, None, []):
        pass
    assert choice(rig)[0], "a run that ended keeps nothing"
