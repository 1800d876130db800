"""restore-redis from a surviving copy: a replica, or the dead master's own files (§2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blocks.environment import Environment
from flows import store as stores
from flows.pinned import pin_redis
from flows.redis.restore import capture, sources
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.steps import build_redis, plan_detaching, replace_redis, start_again, undo
from runbook.errors import OpsError
from runbook.guard.effect import Effect, seconds_from
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.redis.restore.copy import ACT
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.survivors import SurvivingCopy
from tasks.redis.topology.isolation import TAKE_OFF
from tasks.redis.topology.topology import ReplicationTopology

NamedSource = Literal["backup", "replica", "files"]


@dataclass(frozen=True)
class SurvivorRestore:
    """A surviving copy replaces the data directory."""

    report: Report
    env: Environment
    copy: SurvivingCopy
    around: ReplicationTopology
    judged: LiveRedis

    @property
    def acts(self) -> tuple[Act, ...]:
        """The acts of its permit."""
        directory = self.env.redis.data_directory
        return Act(ACT, directory), Act(TAKE_OFF, directory)

    @property
    def effect(self) -> Effect:
        """For the plan's headline."""
        down = seconds_from(self.report.plan_steps, "stop")
        what = f"Redis continues with the data of {self.copy.name}"
        return Effect(what, "undo-restore-redis", (sources.loss_of(self.copy),), down)

    def run(self, permit: Permit) -> Backup:
        """Detach the others (clients can no longer write), capture the copy as a backup, and restore that backup.

        Raises:
            LossExceeded: more would be lost than was confirmed; the earlier state is restored.
            OpsError: the copy cannot be read; the earlier state is restored.
            RunbookFailed: the staged copy differs from the captured backup.
        """
        report, env = self.report, self.env
        gate = RedisGate(report, env, permit, self.around, self.judged)
        report.state_is(
            "no data was replaced; Redis may be stopped, its replicas and Sentinels detached",
            "run it again: the surviving data is unchanged",
        )
        try:
            backup, loss = capture.capture(report, permit, env, self.copy, gate.fence())
            copy = build_redis(report, env, permit, backup)
        except BaseException:
            start_again(report, env, permit, gate.around, was_running=gate.was_running)
            raise
        report.fact("undo", undo(replace_redis(gate, copy, loss)))
        return backup


def restore(report: Report, env: Environment, wanted: NamedSource, prefixes: Sequence[str]) -> None:
    """Choose the copy, plan, and restore it when the run is confirmed.

    Raises:
        OpsError: the parameters do not fit, or a step failed.
        RunbookFailed: there is no such copy, or a check failed.
    """
    if prefixes:
        raise OpsError("redis_source and prefixes exclude each other", "restore prefixes from a backup")
    planned = _prepare(report, env, wanted)
    pin_redis(report, env.redis, replaced=True)
    taken = planned.run(report.permit(*planned.acts, effect=planned.effect))
    report.fail_if_critical()
    stores.mark_verified(report, taken)


def _prepare(report: Report, env: Environment, wanted: NamedSource) -> SurvivorRestore:
    if env.redis.remote:
        raise OpsError(
            f"redis_source={wanted}: the server's files are on another host ([redis] remote)",
            "promote the replica: redis-failover, or REPLICAOF NO ONE on it",
        )
    judged = read_live(env.redis)
    copy, around = sources.compare(report, env, wanted)
    assert copy
    capture.judge(report, env, copy, around)
    report.fail_if_critical()
    capture.plan(report, env, copy)
    plan_detaching(report, env, around)
    report.pin_state("source", copy.name)
    return SurvivorRestore(report, env, copy, around, judged)


def advise(report: Report, env: Environment, backup: Backup, around: ReplicationTopology) -> None:
    """Report, before a restore from a backup, that a surviving copy loses less, or may lose less. Only a plan warns: a
    confirmed run was decided with it."""
    copy = sources.find_better(report, env, sources.find(report, env, around), backup)
    if copy is None:
        return
    less, perhaps = "a surviving copy loses less than the backup", "a surviving copy may lose less than the backup"
    name, value = less if copy.moment else perhaps, f"{copy.name}, {copy.all_keys:,} keys"
    if report.may_change:
        report.fact(name, value)
        return
    report.warn(
        name,
        f"run this with redis_source={copy.kind}",
        value=f"{value}; {copy.loss.text}",
        expected="none",
        follow=[Next("restore-redis", "restore from it", {"redis_source": copy.kind})],
    )
