"""The methods of restore-redis: by directory, over the network, by prefix (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import judge_kept
from flows.redis.restore import network
from flows.redis.restore import prefixes as prefix_steps
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import RedisGate, loss_of
from flows.redis.restore.replacement import (
    STOPPED,
    DirectorySwap,
    RedisFence,
    back_up_other,
    down_seconds,
    fencing,
    judge_kept_server,
    swapping,
)
from flows.redis.restore.steps import (
    building,
    judge_preconditions,
    judge_stoppable,
    keeping,
    living_master,
    report_redis_proof,
)
from flows.redis.restore.survivor import advise
from runbook.change import Carrier, Change, Line
from runbook.guard.effect import Effect, back_to
from runbook.report import Report
from runbook.units import first_of
from tasks.backups.catalogue import Backup
from tasks.redis.restore.copy import RedisCopy
from tasks.redis.restore.fitness import judge_redis_backup
from tasks.redis.restore.live import read_live
from tasks.redis.restore.prefixes import Extra
from tasks.redis.restore.survivors import PART
from tasks.redis.topology.topology import read_topology


class Restoring(Protocol):
    """A planned restore."""

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""

    def carry_out(self, carry: Carrier) -> None:
        """Restore and prove the data."""


@dataclass(frozen=True)
class RedisReplacement:
    """A proven copy of a backup replaces the data directory. `other`: the server whose data no directory keeps: it is
    backed up first."""

    report: Report
    env: Environment
    backup: Backup
    other: Redis | None
    building: Change[[], RedisCopy]
    keeping: Change[[], str] | None
    fence: RedisFence
    swap: DirectorySwap

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        keeping = [self.keeping] if self.keeping else []
        return [self.building, *keeping, *self.fence.lines, *self.swap.lines]

    def carry_out(self, carry: Carrier) -> None:
        """Build, prove, swap, verify.

        Raises:
            RunbookFailed: the copy differs from the backup; nothing was stopped.
            OpsError: the service does not stop, or does not start with the copy.
        """
        self.replace(carry, self.build(carry))

    def build(self, carry: Carrier) -> RedisCopy:
        """Build and prove the staged copy.

        Raises:
            RunbookFailed: it differs from the backup.
        """
        copy = carry(self.building)
        report_redis_proof(self.report, self.env, self.backup, copy)
        return copy

    def replace(self, carry: Carrier, copy: RedisCopy) -> None:
        """Make the copy live. If the swap fails, the old data is started again."""
        other = back_up_other(carry, self.keeping, self.other)
        self.fence.carry_out(carry)
        self.swap.carry_out(carry, copy, loss_of(self.backup), self.backup, other)


def replacing(report: Report, env: Environment, backup: Backup) -> RedisReplacement:
    """Judge and plan the replacement of the data directory by a fetched backup.

    Raises:
        OpsError, Unreachable: the live server refuses.
        RunbookFailed: a check failed.
    """
    judged = read_live(env.redis)
    around = read_topology(env.redis, env.reports_directory)
    fitness = judge_redis_backup(env.redis, backup, around)
    judge_preconditions(report, fitness.preconditions)
    report.fail_if_critical()
    if other := living_master(env, around):
        judge_kept(report, env, other)
        report.fail_if_critical()
    advise(report, env, backup, around)
    live, keys = fitness.live_keys, int(backup.manifest.content.get("rdb_keys", 0))
    now = "the server is down" if live is None else f"{sum(live.values()):,} keys now"
    gate = RedisGate(report, env, around, judged)
    service = f"the service {env.services.name_of('redis')} ({now})"
    needs = [
        partial(judge_stoppable, env=env, is_up=live is not None),
        partial(judge_kept_server, env=env, around=around, kept=other),
    ]
    return RedisReplacement(
        *(report, env, backup, other),
        building(env, backup, fitness),
        keeping(report, env, other) if other else None,
        fencing(gate, service, STOPPED, needs),
        swapping(gate, keys, fitness.load_seconds),
    )


def effect(lines: Sequence[Line[..., Any]], env: Environment, backup: Backup, prefixes: Sequence[str]) -> Effect:
    """The headline of the plan."""
    taken = backup.manifest.taken
    what, undo = PART, "undo-restore-redis"
    down: float | str = down_seconds(lines)
    if prefixes:
        what, down = f"Redis, only {first_of(prefixes)},", 0.0
    elif env.redis.remote:
        down = "writes are refused meanwhile"
    if prefixes or env.redis.remote:
        undo = "restore-redis with the backup that the run takes first"
    return Effect(back_to(what, taken), undo, (loss_of(backup, prefixes),), down)


@contextlib.contextmanager
def prepare(
    report: Report,
    env: Environment,
    chosen: RestorableRedis,
    prefixes: Sequence[str],
    extra: Extra,
    expected_removed: int,
) -> Iterator[Restoring]:
    """Check and plan the restore: of some prefixes, over the network, or of the data directory.

    Raises:
        OpsError, Unreachable: the live server refuses or does not answer.
        RunbookFailed: a check failed.
    """
    if prefixes:
        with prefix_steps.prepare(report, env, chosen, prefixes, extra, expected_removed) as some:
            yield some
    elif env.redis.remote:
        with network.prepare(report, env, chosen) as whole:
            yield whole
    else:
        yield replacing(report, env, chosen.backup)
