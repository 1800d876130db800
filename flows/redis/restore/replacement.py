"""The lines of a plan that stop Redis behind its gate, and replace its data directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.steps import (
    DETACHED,
    attach_all,
    attach_step,
    detach_steps,
    judge_detaching,
    living_master,
    put_back,
    undo,
)
from runbook.change import Carrier, Change, Line, State
from runbook.errors import OpsError
from runbook.guard.effect import seconds_from
from runbook.guard.loss import Loss
from runbook.kinds import Bound
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.redis.restore.copy import RedisCopy
from tasks.redis.restore.live import LiveRedis
from tasks.redis.restore.swap import SwappedRedis, start_redis, swap_redis, verify_live_redis
from tasks.redis.restore.undoing import note_started
from tasks.redis.topology.isolation import attach, detach, note_swapped, wait_for_followers
from tasks.redis.topology.topology import ReplicationTopology

T = TypeVar("T")
Need = Callable[[Report], object]

STOPPED = State(
    "the old data is in place; Redis may be stopped, its replicas and Sentinels detached",
    "run it again; or start the service and run reattach-redis",
)


@dataclass(frozen=True)
class RedisFence:
    """The lines that detach the replicas and Sentinels (None: there are none) and stop the server. If the run fails
    before its new state is final, all of that is reversed."""

    detaching: Change[[], ReplicationTopology] | None
    stopping: Change[[], LiveRedis]

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines in order."""
        return [*([self.detaching] if self.detaching else []), self.stopping]

    def carry_out(self, carry: Carrier) -> LiveRedis:
        """Carry them out; returns the server at its stop.

        Raises:
            LossExceeded: it is not the server that was judged. Nothing was replaced.
            OpsError: a server refuses, or does not stop.
        """
        if self.detaching:
            carry(self.detaching)
        return carry(self.stopping)


def fencing(gate: RedisGate, service: str, state: State, needs: Sequence[Need]) -> RedisFence:
    """Plan to detach the other servers and to stop this one. `service`: the plan's words for it; `state`: from then on,
    should the run fail; `needs`: judged before the first of both."""
    env, around = gate.env, gate.around
    detaching = None
    if steps := detach_steps(env, around):
        first, *others = steps
        detaching = Change(
            gate.detach,
            first.step,
            first.detail,
            seconds=first.seconds,
            more=others,
            by=[detach.bind(env.redis)],
            needs=[partial(judge_detaching, env=env, around=around), *needs],
            begun=state,
            reverse=partial(_attach_again, gate),
        )
    stopping = Change(
        gate.stop,
        "stop",
        service,
        seconds=2,
        needs=[] if detaching else needs,
        begun=state,
        reverse=partial(_start_again, gate),
    )
    return RedisFence(detaching, stopping)


def down_seconds(lines: Sequence[Line[..., Any]]) -> float:
    """The estimated seconds from the server's stop on."""
    return seconds_from([step for one in lines for step in one.planned], "stop")


def judge_kept_server(report: Report, env: Environment, around: ReplicationTopology, kept: Redis | None) -> None:
    """The server whose data no directory keeps is the one that the run backs up."""
    found = living_master(env, around)
    address, planned = (server.address if server else "none" for server in (found, kept))
    report.require(
        "Redis data that no directory keeps",
        address == planned,
        "run it again: it backs this data up first",
        value=address,
        expected=planned,
    )


def back_up_other(carry: Carrier, keeping: Change[[], str] | None, server: Redis | None) -> str:
    """Back up the server whose data no directory keeps; returns how to undo its replacement."""
    if not (keeping and server):
        return ""
    kept = carry(keeping)
    return f"; for the data of {server.address}: restore-redis with backup={kept}"


def _start_again(gate: RedisGate) -> None:
    if gate.was_running:
        start_redis(gate.env.redis, gate.env.services)


def _attach_again(gate: RedisGate) -> None:
    """Another server that is the master serves nobody until it is attached."""
    if gate.was_running or gate.around.master not in ("", gate.around.own):
        put_back(gate.report, gate.env, gate.around)


def attaching(
    report: Report, env: Environment, around: ReplicationTopology, done: Callable[[T], State]
) -> Change[[ReplicationTopology, T], T] | None:
    """Plan to attach the replicas and Sentinels to the new data. Its call takes what was detached, and what `done`
    makes the state of; None: nothing is detached."""
    if around.is_alone:
        return None

    def attach_again(taken: ReplicationTopology, result: T) -> T:
        attach_all(report, env, taken)
        return result

    step = attach_step(around)
    by: list[Bound[..., Any]] = [attach.bind(env.redis), wait_for_followers.bind(env.redis)]
    return Change(attach_again, step.step, step.detail, seconds=step.seconds, by=by, begun=DETACHED, done=done)


@dataclass(frozen=True)
class DirectorySwap:
    """The lines that make a staged copy live behind the gate, start it, and attach the replicas and Sentinels."""

    gate: RedisGate
    swapping: Change[[RedisCopy, Loss, Backup | None], SwappedRedis]
    starting: Change[[SwappedRedis, RedisCopy], None]
    attaching: Change[[ReplicationTopology, SwappedRedis], SwappedRedis] | None

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines in order."""
        return [self.swapping, self.starting, *([self.attaching] if self.attaching else [])]

    def carry_out(
        self, carry: Carrier, copy: RedisCopy, loss: Loss, backup: Backup | None = None, other_undo: str = ""
    ) -> None:
        """Carry them out. `loss`: what the copy lacks; `backup`: the one that it is of, if that is the source;
        `other_undo`: how to undo the rest.

        Raises:
            LossExceeded: the live side is another one now, or more would be lost than was confirmed. Nothing was
                replaced.
            OpsError: the server does not start with the copy (the hint names the undo).
            RunbookFailed: it does not serve the copy.
        """
        report, reports = self.gate.report, self.gate.env.reports_directory
        swapped = carry(self.swapping, copy, loss, backup)
        report.loses(loss)
        taken = note_swapped(reports, self.gate.around)
        report.fact("Redis data kept", swapped.kept or "there was none")
        report.fact("undo", undo(swapped) + other_undo)
        carry(self.starting, swapped, copy)
        if self.attaching:
            carry(self.attaching, taken, swapped)


def swapping(gate: RedisGate, keys: int, load_seconds: float) -> DirectorySwap:
    """Plan to make a staged copy with so many keys live."""
    report, env = gate.report, gate.env
    action = swap_redis.bind(env.redis)

    def swap(copy: RedisCopy, loss: Loss, backup: Backup | None) -> SwappedRedis:
        gate.judge(loss, backup)
        return action(copy)

    swapping = Change(
        swap,
        "swap",
        f"{env.redis.data_directory}: the old data is kept next to it as .superseded_…",
        seconds=0.1,
        by=[action],
        begun=STOPPED,
        done=_is_live,
        is_final=True,
    )
    starting = Change(
        partial(_start, report, env),
        "start and verify",
        f"{keys:,} keys loaded, AOF and RDB state",
        seconds=2 + load_seconds,
    )
    return DirectorySwap(gate, swapping, starting, attaching(report, env, gate.around, _is_live))


def _is_live(swapped: SwappedRedis) -> State:
    return State("the backup's data is in place; the replaced data is kept", undo(swapped))


def _start(report: Report, env: Environment, swapped: SwappedRedis, copy: RedisCopy) -> None:
    back = undo(swapped)
    try:
        started = start_redis.after(swapped)(env.redis, env.services)
        note_started(env.redis, env.reports_directory, swapped.kept)
        differences = verify_live_redis.after(started)(env.redis, copy)
    except OpsError as error:
        raise OpsError(f"Redis does not serve the restored data: {error.message}", error.hint or back) from None
    report.require(
        "live Redis serves the copy",
        not differences,
        back,
        value="; ".join(differences) or "loaded as many keys as were proven",
        expected="no difference",
    )
    report.fail_if_critical()
