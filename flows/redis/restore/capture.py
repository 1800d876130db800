"""A surviving copy of Redis's data as the source of a restore: it is captured as a proven backup first (§2.3)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from blocks.environment import Environment
from flows import store as stores
from flows.loss import require_confirmed
from flows.redis.backup import keep_live, seal
from flows.redis.restore.findings import report_no_checksum
from flows.redis.restore.steps import UNTOUCHED, judge_preconditions, judge_stoppable
from runbook import metrics
from runbook.change import Change, State
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from runbook.guard.loss import Loss
from runbook.report import Report, Status
from runbook.units import size
from tasks.backups import publishing
from tasks.backups.catalogue import KEPT, Backup
from tasks.host.disk import read_disk
from tasks.redis.backup.live_aof import snapshot_stopped_aof
from tasks.redis.backup.rdb import read_rdb
from tasks.redis.backup.snapshot import RDB, Snapshot, copy_settings, read_manifest
from tasks.redis.content.manifest import EMPTY, RedisContent
from tasks.redis.persistence.newest import aof_manifest, find_newest
from tasks.redis.restore.copy import RedisCopy, build_redis_copy
from tasks.redis.restore.fitness import RedisFitness, judge_redis_copy
from tasks.redis.restore.live import LiveRedis
from tasks.redis.restore.survivors import SurvivingCopy, back_up_replica, files_loss, require_received
from tasks.redis.server import live_directory
from tasks.redis.settings.file import read_configuration
from tasks.redis.topology.topology import ReplicationTopology


def judge(report: Report, env: Environment, copy: SurvivingCopy, around: ReplicationTopology) -> RedisFitness:
    """Judge a copy, and whether the server that it replaces can be stopped."""
    fitness = judge_copy(report, env, copy, around)
    judge_stoppable(report, env, is_up=fitness.live_keys is not None)
    return fitness


def judge_copy(report: Report, env: Environment, copy: SurvivingCopy, around: ReplicationTopology) -> RedisFitness:
    """Whether a copy's data can replace the server's, and fits in the store. Its keys are proven after the capture."""
    databases = {number: EMPTY.model_copy(update={"all_keys": keys}) for number, keys in copy.keys.items()}
    content = RedisContent(server_version=copy.version, databases=databases, memory_bytes=copy.memory_bytes)
    fitness = judge_redis_copy(env.redis, content, around)
    judge_preconditions(report, fitness.preconditions)
    if copy.is_aof:
        report_no_checksum(report)
    disk = read_disk.after(fitness)(stores.store_for(env, "redis").spool)
    report.require(
        "free space for Redis's surviving data",
        disk.free_bytes > copy.memory_bytes,
        f"free {size(copy.memory_bytes - disk.free_bytes)} in {disk.path}",
        value=size(disk.free_bytes),
        expected=f"more than {size(copy.memory_bytes)}",
    )
    return fitness


def judge_gap(report: Report, copy: SurvivingCopy, moment: datetime) -> None:
    """Compare a copy's time with the database's, `moment`: Redis may name rows that the database does not have."""
    if copy.moment:
        hint = "expect inconsistencies: Redis is newer than the database. Name prefixes made anew in drop_prefixes"
        gap = abs((copy.moment - moment).total_seconds())
        report.judge(metrics.BACKUP_GAP, gap, hint, of="redis (surviving copy)", worst=Status.WARN)


def plan(report: Report, env: Environment, copy: SurvivingCopy) -> None:
    """Plan the capture and the staged copy."""
    (capture_step,), (build_step,) = capturing(report, env, copy, UNTOUCHED).planned, building(env, copy).planned
    report.plan_steps.append(replace(capture_step, by=(publishing.publish.name,)))
    report.plan_steps.append(replace(build_step, by=(build_redis_copy.name,)))


def capturing(
    report: Report, env: Environment, copy: SurvivingCopy, state: State
) -> Change[[LiveRedis], tuple[Backup, Loss]]:
    """The backup of a surviving copy. `state`: from then on, should the run fail."""
    return Change(
        partial(capture, report, env, copy),
        "back up Redis's surviving data",
        f"{copy.name}, {copy.all_keys:,} keys, after the services are stopped; the backup is proven before it is used",
        size=copy.memory_bytes,
        seconds=2,
        by=[back_up_replica.bind(env.redis)] if copy.kind == "replica" else [],
        begun=state,
    )


def building(env: Environment, copy: SurvivingCopy) -> Change[[Backup], RedisCopy]:
    """The staged copy of the captured backup."""
    return Change(
        build_redis_copy.bind(env.redis),
        "restore a staged copy of Redis",
        f"that backup into {env.redis.data_directory}.restoring, then prove it",
        size=copy.memory_bytes,
        seconds=1,
    )


def capture(report: Report, env: Environment, copy: SurvivingCopy, live: LiveRedis) -> tuple[Backup, Loss]:
    """Back up a surviving copy into the store, with a manifest, and measure its loss. `latest` never means that backup.
    The services are stopped, and the replicas detached. `live`: the server at its stop.

    Raises:
        LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
        Unreachable, OpsError: the copy cannot be read. Nothing live was replaced.
        VerificationFailed: it has no keys any more.
    """
    loss = _measure(env, copy, live)
    require_confirmed(report, loss)
    if copy.kind == "replica":
        backing_up = back_up_replica.bind(env.redis, copy, env.reports_directory)
        backup = backing_up(lambda replica: keep_live(report, env, replica))
    else:
        backup = _capture_files(report, env)
    failpoint("redis: surviving data captured")
    keys = RedisContent.model_validate(backup.manifest.content).all_keys
    if not keys:
        raise VerificationFailed(f"{copy.name} has no keys any more", "run this again with redis_source=backup")
    report.fact("redis backup", f"{backup.name}: {keys:,} keys of {copy.name}")
    return backup, loss


def _measure(env: Environment, copy: SurvivingCopy, live: LiveRedis) -> Loss:
    """The loss behind the fence: a replica still has what it had, and files are those of the server that was judged."""
    if copy.kind == "replica":
        require_received(env.redis, copy)
        return copy.loss
    if copy.loss.unknown or copy.received or (live.run_id and copy.loss.is_none):
        return copy.loss  # a replica's files; or a master's that it wrote until its stop
    return files_loss(find_newest(read_configuration(Path(env.redis.config_file)), live_directory(env.redis)))


def _capture_files(report: Report, env: Environment) -> Backup:
    block, directory = env.redis, live_directory(env.redis)
    configuration = read_configuration(Path(block.config_file))
    is_aof = find_newest(configuration, directory).is_aof

    def work(target: Path) -> tuple[Snapshot, RedisContent]:
        if is_aof:
            taken = snapshot_stopped_aof(block, aof_manifest(directory, configuration), target)
            return taken, taken.content
        rdb = directory / configuration.rdb
        inside.copy(rdb, target / RDB)
        missed = tuple(copy_settings(block, target))
        return Snapshot(target / RDB, read_rdb(rdb).written, 0.0, missed), read_manifest(block, target)

    notes = {"kept_by": report.runbook}
    return seal(env, stores.store_for(env, "redis"), block.address, work, notes, of=KEPT.format(env.name))
