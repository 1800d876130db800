"""restore-redis from a surviving copy: a replica, or the dead master's own files (§2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows import store as stores
from flows.pinned import pin_redis
from flows.redis.backup import judge_kept
from flows.redis.restore import capture, sources
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.replacement import (
    DirectorySwap,
    RedisFence,
    back_up_other,
    down_seconds,
    fencing,
    judge_kept_server,
    swapping,
)
from flows.redis.restore.steps import judge_stoppable, keeping, living_master, report_redis_proof
from runbook.change import Carrier, Change, Line, State, carrying_out
from runbook.errors import OpsError
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.next import Next
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.redis.restore.copy import RedisCopy
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.survivors import SurvivingCopy
from tasks.redis.topology.topology import ReplicationTopology

NamedSource = Literal["backup", "replica", "files"]
STATE = State(
    "no data was replaced; Redis may be stopped, its replicas and Sentinels detached",
    "run it again: the surviving data is unchanged",
)


@dataclass(frozen=True)
class SurvivorRestore:
    """A surviving copy replaces the data directory. `other`: the server whose data no directory keeps: it is backed up
    first."""

    report: Report
    env: Environment
    copy: SurvivingCopy
    other: Redis | None
    keeping: Change[[], str] | None
    fence: RedisFence
    capturing: Change[[LiveRedis], tuple[Backup, Loss]]
    building: Change[[Backup], RedisCopy]
    swap: DirectorySwap

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        keeping = [self.keeping] if self.keeping else []
        return [*keeping, *self.fence.lines, self.capturing, self.building, *self.swap.lines]

    @property
    def effect(self) -> Effect:
        """For the plan's headline."""
        what = f"Redis continues with the data of {self.copy.name}"
        return Effect(what, "undo-restore-redis", (sources.loss_of(self.copy),), down_seconds(self.lines))

    def carry_out(self, carry: Carrier) -> Backup:
        """Detach the others (clients can no longer write), capture the copy as a backup, and restore that backup.

        Raises:
            LossExceeded: more would be lost than was confirmed; the earlier state is restored.
            OpsError: the copy cannot be read; the earlier state is restored.
            RunbookFailed: the staged copy differs from the captured backup.
        """
        other = back_up_other(carry, self.keeping, self.other)
        backup, loss = carry(self.capturing, self.fence.carry_out(carry))
        copy = carry(self.building, backup)
        report_redis_proof(self.report, self.env, backup, copy)
        self.swap.carry_out(carry, copy, loss, other_undo=other)
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
    pins = [lambda report: pin_redis(report, env.redis, replaced=True)]
    with carrying_out(report, *planned.lines, effect=planned.effect, pins=pins) as carry:
        taken = planned.carry_out(carry)
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
    fitness = capture.judge_copy(report, env, copy, around)
    report.fail_if_critical()
    report.pin_state("source", copy.name)
    gate, keys = RedisGate(report, env, around, judged), fitness.live_keys
    kept = living_master(env, around)
    # The capture of a surviving copy has all of its server's data.
    other = kept if kept and kept.address != copy.where else None
    if other:
        judge_kept(report, env, other)
        report.fail_if_critical()
    needs = [
        partial(judge_stoppable, env=env, is_up=keys is not None),
        partial(judge_kept_server, env=env, around=around, kept=kept),
    ]
    now = "the server is down" if keys is None else f"{sum(keys.values()):,} keys now"
    return SurvivorRestore(
        *(report, env, copy, other),
        keeping(report, env, other) if other else None,
        fencing(gate, f"the service {env.services.name_of('redis')} ({now})", STATE, needs),
        capture.capturing(report, env, copy, STATE),
        capture.building(env, copy),
        swapping(gate, copy.all_keys, fitness.load_seconds),
    )


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
