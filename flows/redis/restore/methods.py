"""The methods of restore-redis: by directory, over the network, by prefix (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import judge_kept, keep_live
from flows.redis.restore import network
from flows.redis.restore import prefixes as prefix_steps
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import RedisGate, loss_of
from flows.redis.restore.steps import build_redis, judge_server, plan_redis, replace_redis, undo
from flows.redis.restore.survivor import advise
from runbook.guard.effect import Effect, back_to, seconds_from
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.units import first_of
from tasks.backups.catalogue import Backup
from tasks.redis.restore.copy import ACT
from tasks.redis.restore.final_save import has_lost_directory
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.prefixes import Extra
from tasks.redis.restore.survivors import PART
from tasks.redis.topology.isolation import TAKE_OFF
from tasks.redis.topology.topology import ReplicationTopology, read_topology


class Restoring(Protocol):
    """A planned restore."""

    @property
    def acts(self) -> tuple[Act, ...]:
        """The acts of its permit."""

    def run(self, permit: Permit) -> None:
        """Restore and prove the data."""


@dataclass(frozen=True)
class RedisReplacement:
    """A proven copy replaces the data directory."""

    report: Report
    env: Environment
    backup: Backup
    around: ReplicationTopology
    judged: LiveRedis

    @property
    def acts(self) -> tuple[Act, ...]:
        """The acts of its permit."""
        directory = self.env.redis.data_directory
        return Act(ACT, directory), Act(TAKE_OFF, directory)

    def run(self, permit: Permit) -> None:
        """Build, prove, swap, verify.

        Raises:
            RunbookFailed: the copy differs from the backup; nothing was stopped.
            OpsError: the service does not stop, or does not start with the copy.
        """
        self.report.state_is("the live data was not touched", "fix the findings above, then run it again")
        copy = build_redis(self.report, self.env, permit, self.backup)
        kept = ""
        if found := living_master(self.env, self.around):
            kept = keep_live(self.report, self.env, found).name
        gate = RedisGate(self.report, self.env, permit, self.around, self.judged)
        swapped = replace_redis(gate, copy, loss_of(self.backup), self.backup)
        other = f"; for the data of {found.address}: restore-redis with backup={kept}" if found else ""
        self.report.fact("undo", undo(swapped) + other)


def effect(report: Report, env: Environment, backup: Backup, prefixes: Sequence[str]) -> Effect:
    """The headline of the plan."""
    taken = backup.manifest.taken
    what, undo = PART, "undo-restore-redis"
    down: float | str = seconds_from(report.plan_steps, "stop")
    if prefixes:
        what, down = f"Redis, only {first_of(prefixes)},", 0.0
    elif env.redis.remote:
        down = "writes are refused meanwhile"
    if prefixes or env.redis.remote:
        undo = "restore-redis with the backup that the run takes first"
    return Effect(back_to(what, taken), undo, (loss_of(backup, prefixes),), down)


def living_master(env: Environment, around: ReplicationTopology) -> Redis | None:
    """The server whose data an undo would lack, so that it must be kept first: another one that is now the master and
    becomes a replica, or this one, if its directory was deleted. A killed run did that before it detached anything."""
    if around.since:
        return None
    if around.master != around.own and around.master in around.reachable:
        return env.redis.at(around.master)
    return env.redis if has_lost_directory(env.redis) else None


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
        judged = read_live(env.redis)
        around = read_topology(env.redis, env.reports_directory)
        fitness = judge_server(report, env, chosen.backup, around)
        report.fail_if_critical()
        if found := living_master(env, around):
            judge_kept(report, env, found)
            report.fail_if_critical()
            report.plan("keep", f"the data of {found.address} as a backup: it is in no directory that is kept")
        advise(report, env, chosen.backup, around)
        plan_redis(report, env, chosen.backup, fitness)
        yield RedisReplacement(report, env, chosen.backup, around, judged)
