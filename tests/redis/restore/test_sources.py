"""The source of a restore is chosen by what the files and the offsets show, and its loss is stated as far as it is
known."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest

from flows.recovery.full.choose import choose_others
from flows.redis.persistence import backup_redis, restore_redis
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.methods import RedisReplacement
from runbook.current import use_report
from runbook.errors import RunbookFailed
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.wait import until
from tasks.recovery_points.following import read_replica_point
from tasks.redis.position import StreamPosition, keep_position, record_position
from tasks.redis.restore.copy import RedisCopy
from tasks.redis.restore.swap import superseded_redis
from tasks.redis.topology.topology import ReplicationTopology
from tests.redis.conftest import Rig
from tests.redis.data import account
from tests.redis.restore.test_survivors import choice, die, in_step, newest
from tests.redis.servers import NAME, PASSWORD, RedisServer, settles

MIB = b"x" * (1 << 20)


def fill(rig: Rig, name: str, count: int) -> None:
    rig.client().mset({f"{name}:{number}": number for number in range(count)})


def test_an_aof_that_was_switched_off_is_older_than_the_rdb_and_than_a_backup(rig: Rig) -> None:
    """The configuration file says appendonly yes; the server stopped to write its AOF."""
    fill(rig, "old", 200)
    rig.client().config_set("appendonly", "no")
    fill(rig, "new", 140)
    backup_redis.fn(NAME)
    rig.crash()
    chosen, found, _ = choice(rig)
    assert (found.copies[0].all_keys, found.copies[0].is_aof) == (340, False), "the RDB of the backup's save"
    assert chosen is None or chosen.all_keys == 340
    (rig.data / "my dump.rdb").unlink()
    chosen, found, _ = choice(rig)
    assert found.copies[0].all_keys == 200
    assert chosen is None, "the backup is newer than the AOF"
    assert not [one for one in restore_redis.fn(NAME).findings if one.name.startswith("a surviving copy")]


def test_an_aof_of_before_a_restart_of_its_host_may_lack_its_last_seconds(rig: Rig) -> None:
    fill(rig, "k", 100)
    rig.crash()
    chosen, _, _ = choice(rig, backup=False)
    assert chosen
    parts = [*(rig.data / "aof files").iterdir()]
    assert chosen.loss.since == datetime.fromtimestamp(max(part.stat().st_mtime for part in parts), UTC)
    before = psutil.boot_time() - 10
    for part in parts:
        os.utime(part, (before, before))
    chosen, _, _ = choice(rig, backup=False)
    assert chosen
    assert chosen.loss.since == datetime.fromtimestamp(before, UTC) - timedelta(seconds=30)


def test_an_aof_that_was_switched_on_is_offered(rig: Rig) -> None:
    """The configuration file says appendonly no."""
    rig.configure(aof=False)
    rig.services.stop("redis")
    rig.services.start("redis")
    rig.wait()
    fill(rig, "old", 100)
    rig.client().save()
    rig.client().config_set("appendonly", "yes")
    settles(lambda: not rig.client().info("persistence")["aof_rewrite_in_progress"], "the AOF's base")
    fill(rig, "new", 140)
    before = account(rig.client())
    rig.crash()
    report = restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert account(rig.client()) == before, report.sentence()


def test_both_numbers_are_stated_after_a_deletion(rig: Rig) -> None:
    fill(rig, "k", 200)
    backup_redis.fn(NAME)
    rig.client().delete(*(f"k:{number}" for number in range(90)))
    kept, _, report = choice(rig)
    assert kept
    assert "110 keys" in report.facts["redis source"]
    assert "200" in report.facts["redis source"]
    assert "lost none" not in report.facts["redis source"]


def test_a_replica_that_hung_has_no_moment(rig: Rig, replica: RedisServer) -> None:
    """Its link ends when the master dies, long after the last write that it received."""
    fill(rig, "k", 100)
    in_step(rig, replica)
    backup_redis.fn(NAME)
    replica.freeze()
    for number in range(30):
        rig.client().set(f"since:{number}", MIB)
    acknowledged = time.time()
    fill(rig, "last", 10)
    rig.crash()
    replica.thaw()
    settles(lambda: replica.client().info("replication")["master_link_status"] == "down", "the end of the link")
    assert not replica.client().exists("last:9")
    chosen, _, _ = choice(rig, wanted="replica")
    assert chosen
    assert chosen.moment is None or chosen.moment.timestamp() < acknowledged, chosen.loss


def lose_directory(rig: Rig, replica: RedisServer) -> None:
    """The master lost its directory and serves again, empty; the replica has a wrong password and keeps its keys."""
    fill(rig, "k", 100)
    in_step(rig, replica)
    backup_redis.fn(NAME)
    fill(rig, "since", 300)
    replica.client().config_set("masterauth", "wrong")
    die(rig, replica)
    rig.account.directory(rig.data, 0o700)
    rig.services.start("redis")
    rig.wait()


def test_a_replica_that_can_no_longer_synchronize_is_better_than_the_backup(rig: Rig, replica: RedisServer) -> None:
    lose_directory(rig, replica)
    chosen, _, report = choice(rig)
    assert chosen, report.facts["redis source"]
    assert (chosen.kind, chosen.all_keys) == ("replica", 400)
    planned = restore_redis.fn(NAME)
    assert "redis_source=replica" in planned.sentence()
    restored = restore_redis.fn(NAME, redis_source="replica", confirm=NAME)
    assert rig.client().dbsize() == 400, restored.sentence()


def test_a_replica_that_copies_an_empty_master_meanwhile_is_no_source(
    rig: Rig, replica: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_directory(rig, replica)
    detach = RedisGate.detach

    def detached(gate: RedisGate) -> ReplicationTopology:
        replica.client().config_set("masterauth", PASSWORD)
        settles(lambda: replica.client().dbsize() == 0, "the replica of an empty master")
        return detach(gate)

    monkeypatch.setattr(RedisGate, "detach", detached)
    with pytest.raises(RunbookFailed, match="has copied another master since it was judged"):
        restore_redis.fn(NAME, redis_source="replica", confirm=NAME)
    assert rig.client().dbsize() == 0


@pytest.mark.parametrize("state", ["down", "up"])
def test_a_server_that_comes_back_meanwhile_is_not_replaced(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A supervisor starts it while the copy is built, and clients write."""
    fill(rig, "k", 100)
    backup_redis.fn(NAME)
    if state == "down":
        rig.crash()
    build = RedisReplacement.build

    def built(*given: Any) -> RedisCopy:
        copy = build(*given)
        if state == "up":
            rig.crash()
        rig.services.start("redis")
        rig.wait()
        fill(rig, "since", 50)
        return copy

    monkeypatch.setattr(RedisReplacement, "build", built)
    with pytest.raises(RunbookFailed, match="it was down when judged" if state == "down" else "has restarted since"):
        restore_redis.fn(NAME, confirm=NAME)
    assert rig.client().dbsize() == 150
    assert not superseded_redis(rig.environment.redis)


def test_a_server_that_ran_meanwhile_and_died_again_is_not_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rig, "k", 100)
    backup_redis.fn(NAME)
    rig.crash()
    build = RedisReplacement.build

    def built(*given: Any) -> RedisCopy:
        rig.services.start("redis")
        rig.wait()
        fill(rig, "since", 50)
        rig.crash()
        return build(*given)

    monkeypatch.setattr(RedisReplacement, "build", built)
    with pytest.raises(RunbookFailed, match="was down when judged, and has written data since"):
        restore_redis.fn(NAME, confirm=NAME)
    rig.services.start("redis")
    rig.wait()
    assert rig.client().dbsize() == 150


def test_the_headline_and_the_report_state_the_loss(rig: Rig) -> None:
    """The plan and the run by the same value; an AOF as the source has no checksums."""
    fill(rig, "k", 100)
    backup_redis.fn(NAME)
    taken = newest(rig).manifest.taken
    planned = restore_redis.fn(NAME)
    assert "writes of Redis of the last " in planned.sentence()
    done = restore_redis.fn(NAME, confirm=NAME)
    assert done.losses == {"Redis": Loss.everything_since("Redis", taken)}
    fill(rig, "since", 50)
    rig.crash()
    planned = restore_redis.fn(NAME, redis_source="files")
    assert "at most the writes of Redis of the last " in planned.sentence()
    assert "no checksums" in planned.facts["AOF"]
    done = restore_redis.fn(NAME, redis_source="files", confirm=NAME)
    assert done.losses["Redis"].at_most
    assert rig.client().dbsize() == 150


def test_a_check_records_how_far_the_master_is(rig: Rig, replica: RedisServer) -> None:
    """Without a backup and without Sentinels: a replica that had received it is taken, another one only by name."""
    fill(rig, "k", 100)
    in_step(rig, replica)
    env = rig.environment
    before = datetime.now(UTC)
    assert keep_position.work(env.redis, env.reports_directory)
    in_step(rig, replica)
    replica.freeze()
    rig.client().set("large", MIB * 30)
    kept = keep_position.work(env.redis, env.reports_directory)
    rig.crash()
    shutil.rmtree(rig.data)
    replica.thaw()
    settles(lambda: replica.client().info("replication")["master_link_status"] == "down", "the end of the link")
    with pytest.raises(RunbookFailed, match="or with without=redis to give it up") as raised:
        choice(rig, backup=False)
    assert "bytes of what the master had written by" in raised.value.report.sentence()
    assert kept
    point = read_replica_point.work(env)
    assert point
    assert (point.at, bool(point.problem)) == (None, True), "no recovery point that nobody knows"
    record_position(env.reports_directory, StreamPosition(kept.replid, 1, before))
    point = read_replica_point.work(env)
    assert point
    assert (point.at, point.exact, point.problem) == (before, False, "")
    chosen, _, _ = choice(rig, backup=False)
    assert chosen
    assert chosen.loss == Loss.at_most_since("Redis", before)


def test_the_newest_backup_is_taken_unless_a_time_was_asked_for(rig: Rig) -> None:
    """Not the one that is nearest to the database's last commit."""
    rig.client().set("a", 1)
    backup_redis.fn(NAME)
    first = newest(rig)
    rig.client().set("b", 1)
    until(lambda: backup_redis.fn(NAME).facts["backup"] != first.name, what="a backup of another second", seconds=10)
    rig.crash()
    shutil.rmtree(rig.data)
    for latest, name in ((True, newest(rig).name), (False, first.name)):
        report = Report("trial", NAME)
        with use_report(report):
            found = choose_others(report, rig.environment, first.manifest.taken, "backups", (), "auto", latest=latest)
        assert found.redis
        assert found.redis.name == name
