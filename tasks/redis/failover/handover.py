"""Failover of a data set without loss of acknowledged writes, or with a known loss (§8.3).

https://valkey.io/topics/sentinel/ https://valkey.io/commands/failover/ https://valkey.io/commands/client-pause/
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.log import logger
from runbook.wait import until
from tasks.redis.failover.command import How, begin_failover
from tasks.redis.failover.group import GroupMember, quick, read_member
from tasks.redis.failover.ledger import RedisFailoverLedger, RedisFailoverMarker
from tasks.redis.failover.pause import LONGEST_SECONDS, Pause
from tasks.redis.failover.promotion import (
    HandOver,
    PromotionChoice,
    await_agreement,
    await_late_promotion,
    await_promotion,
    clients_of,
    views,
)
from tasks.redis.failover.rights import DEMOTING
from tasks.redis.sentinels import Watch, ask_sentinels
from tasks.redis.server import call

ACT = "fail over"
WRITE_SECONDS = 20.0
OWN_SECONDS = 4.0
"""Sentinels that see a dead master start a failover within about two seconds, or not soon."""


@action(of=lambda choice: Act(ACT, choice.target))
def hand_over(block: Redis, choice: PromotionChoice) -> HandOver:
    """From a running master to a replica: pause writes, wait until the replica has them all, switch, demote the old
    master.

    It is one step, because writes are paused. If it is killed before the Sentinels start, writes continue after
    `choice.pause_seconds`. If it is killed later, the Sentinels complete the failover; the old master refuses writes
    for another ten seconds, until it is a replica (in a coordinated failover it pauses writes itself).

    Raises:
        OpsError: it was not started (writes continue), was not completed in time, or the master has died.
    """
    try:
        return _hand_over(block, choice)
    except OpsError as error:
        if read_member(block, choice.master).dead:
            raise OpsError(
                f"{choice.master} has died meanwhile: {error.message}", "run it again with mode=unplanned"
            ) from None
        raise


def _hand_over(block: Redis, choice: PromotionChoice) -> HandOver:
    old = block.at(choice.master)
    with RedisFailoverLedger(block) as ledger:
        RedisFailoverMarker(old=choice.master, candidate=choice.candidate, replid=choice.replid).write_to(old)
        ledger.wait_for(choice.master, WRITE_SECONDS)
        failpoint("failover: remembered")
        with Pause(old, choice.pause_seconds) as pause:
            failpoint("failover: paused")
            stood = _catch_up(block, choice)
            caught_up = time.monotonic()
            failpoint("failover: caught up")
            how = begin_switch(block, choice, pause)
            failpoint("failover: begun")
            new = await_switch(block, choice, how, pause)
            switched = time.monotonic()
            # In a coordinated failover the old master is a replica before the new one is a master: no pause is needed.
            handed = read_member(block, choice.master).role == "slave"
            failpoint("failover: promoted")
            await_agreement(block, choice, new)
            agreed = time.monotonic()
            failpoint("failover: agreed")
            unbroken = _demote(old, block.at(new.address), pause) or handed
            pause.lift()
        first = ledger.wait_for(new.address, WRITE_SECONDS)
        account = ledger.account(block.at(new.address))
    RedisFailoverMarker.remove_from(block.at(new.address))
    return HandOver(
        choice.master,
        new,
        how,
        stood,
        choice.replid,
        unbroken,
        caught_up - pause.began,
        switched - pause.began,
        agreed - pause.began,
        first.at - pause.began,
        account,
    )


@action(of=lambda old, new: Act(ACT, f"{old} → {new}"), idempotent=True)
def make_follow(block: Redis, old: str, new: str, gate: Callable[[GroupMember], None]) -> GroupMember:
    """Complete a killed run: demote the old master, if it is not a replica yet. `gate`: judges what only that one has,
    while its writes are paused.

    Raises:
        LossExceeded: the gate refuses; it stays a master, and its writes continue.
        OpsError: not all Sentinels name `new`, or the old master refuses.
    """
    watch = ask_sentinels(block)
    if watch.master != new:
        raise OpsError(f"the Sentinels' view changed meanwhile: {watch.describe()}", "run it again")
    left = read_member(block, old)
    if left.is_master:
        with Pause(block.at(old), LONGEST_SECONDS) as pause:
            left = read_member(block, old)
            gate(left)
            with quick(block.at(old)) as client:
                _follow(client, block.at(old), block.at(new))
            pause.lift()
    return left


@action(of=lambda choice: Act(ACT, choice.target))
def take_over(block: Redis, choice: PromotionChoice, gate: Callable[[Sequence[str]], None]) -> HandOver:
    """From a dead master: wait for the Sentinels' failover; start one if they do not (never a second). `gate`: judges
    what the replicas have, directly before this run starts it.

    Raises:
        LossExceeded: the gate refuses; no failover was started.
        OpsError: the master answers again, or no replica was promoted in time.
    """
    began = time.monotonic()
    with RedisFailoverLedger(block) as ledger:
        forcing = _Forcing(block, choice, gate)
        new = await_promotion(block, choice, forcing.patience_seconds, forcing.look)
        switched = time.monotonic()
        failpoint("failover: promoted")
        await_agreement(block, choice, new)
        agreed = time.monotonic()
        first = ledger.wait_for(new.address, WRITE_SECONDS)
        account = ledger.account(block.at(new.address))
    return HandOver(
        choice.master,
        new,
        forcing.how,
        -1,
        choice.replid,
        False,
        0.0,
        switched - began,
        agreed - began,
        first.at - began,
        account,
    )


def _catch_up(block: Redis, choice: PromotionChoice) -> int:
    """Wait until all candidates have every byte; returns the stream's offset."""
    with clients_of(block, (choice.master, *choice.needed)) as clients:
        master = clients.pop(choice.master).info("replication")
        if master["role"] != "master" or str(master["master_replid"]) != choice.replid:
            raise OpsError(f"{choice.master} is no longer the master that was checked", "run it again")
        stood, behind = int(master["master_repl_offset"]), dict[str, int]()

        def caught_up() -> bool:
            for address, client in clients.items():
                info = client.info("replication")
                if info["role"] == "master":
                    raise OpsError(f"{address} was promoted by another client; writes continue", "run it again")
                behind[address] = stood - int(info["slave_repl_offset"])
            return all(lag <= 0 for lag in behind.values())

        try:
            until(caught_up, what="equal offsets", seconds=choice.pause_seconds, every_seconds=0.005)
        except Unreachable:
            late = ", ".join(f"{address} by {lag:,} bytes" for address, lag in behind.items() if lag > 0)
            raise OpsError(
                f"with writes paused for {choice.pause_seconds:.1f} s, replicas stayed behind: {late}; writes continue",
                "check its network and its log; run it again when it keeps up",
            ) from None
    return stood


def _demote(old: Redis, new: Redis, pause: Pause) -> bool:
    """Demote the old master; returns whether its writes were paused without a gap until then.

    The Sentinels would not demote it during the pause: the pause blocks their PUBLISH too, so they see it as down.
    """
    with quick(old) as client:
        if client.info("replication")["role"] == "master":
            _follow(client, old, new)
    return pause.unbroken


def _follow(client: redis.Redis, old: Redis, new: Redis) -> None:
    """Demote it in one transaction, as the Sentinels would about ten seconds later; its clients then look up the new
    master."""
    with client.pipeline(transaction=True) as pipe:
        for words in (("REPLICAOF", new.host, new.port), *DEMOTING):
            call(cast(redis.Redis, pipe), *words)
        first, *_ = pipe.execute(raise_on_error=False)
    if isinstance(first, redis.RedisError):
        raise old.refused(first)


class _Forcing:
    """Watches the Sentinels of a dead master, and starts a failover if they do not."""

    def __init__(self, block: Redis, choice: PromotionChoice, gate: Callable[[Sequence[str]], None]) -> None:
        self.how = "by the Sentinels themselves"
        self.patience_seconds = 60.0
        self._block, self._choice, self._gate = block, choice, gate
        self._idle_since = time.monotonic()
        self._forced = False

    def look(self) -> None:
        """Called until a replica is promoted."""
        seen = views(self._block, self._choice)
        if self._forced or any(view.in_progress or view.master != self._choice.master for view in seen):
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > OWN_SECONDS:
            self._force()

    def _force(self) -> None:
        master = read_member(self._block, self._choice.master)
        if not master.dead:
            raise OpsError(
                f"{self._choice.master} answers again; no failover was started", "run it again with mode=planned"
            )
        self._gate(self._choice.needed)
        logger().warning("the Sentinels start no failover: this run starts one")
        how = begin_failover(self._block, self._choice.sentinels[0], coordinated=False)
        self.how = "by the Sentinels themselves" if how == "under way" else "forced by this run"
        self._forced = True
        failpoint("failover: forced")


LEAST_SWITCH_SECONDS, MOST_SWITCH_SECONDS = 3.0, 20.0


def begin_switch(block: Redis, choice: PromotionChoice, pause: Pause) -> How:
    """Start the failover, only while writes are paused and no Sentinel has started one.

    Raises:
        OpsError: it was not started; writes continue.
        Unreachable: the Sentinel did not answer; it may have started.
    """
    watch = Watch(views(block, choice))
    if watch.master != choice.master or any(view.in_progress for view in watch.answering):
        raise OpsError(f"the Sentinels' view changed meanwhile: {watch.describe()}; writes continue", "run it again")
    if not pause.unbroken:
        raise OpsError("this run was suspended for longer than the pause of writes; writes continue", "run it again")
    pause.hold(LONGEST_SECONDS)
    pause.keep = True
    failpoint("failover: held")
    try:
        return begin_failover(block, choice.sentinels[0], coordinated=choice.coordinated)
    except Unreachable:  # it may have started
        raise
    except OpsError:
        pause.keep = False
        raise


def await_switch(block: Redis, choice: PromotionChoice, how: How, pause: Pause) -> GroupMember:
    """Wait for the promotion. A failover that can be aborted is aborted before the Sentinels see the paused master as
    down. A forced one cannot be aborted: writes before its end would be lost.

    Raises:
        OpsError: no replica was or will be promoted; writes continue.
        Unreachable: no replica was promoted in time.
    """
    seconds = min(max(2 * choice.pause_seconds, LEAST_SWITCH_SECONDS), MOST_SWITCH_SECONDS)
    if how == "coordinated":
        # Its FAILOVER may stand behind a PUBLISH of the Sentinel's, and that behind our pause, until that has ended.
        # It pauses writes itself, and switches only when the candidate has every byte.
        with contextlib.suppress(OpsError):
            pause.lift()
    try:
        return await_promotion(block, choice, seconds)
    except Unreachable as error:
        if how != "coordinated":
            logger().warning(
                "%s: the failover is still under way; writes on %s wait for its end", error.message, choice.master
            )
            failpoint("failover: late")
            return _await_end(block, choice, pause)
        pause.keep = False
        # The master's own pause would last for the Sentinels' failover-timeout: minutes.
        with contextlib.suppress(OpsError), quick(block.at(choice.master)) as client:
            call(client, "FAILOVER", "ABORT")
        raise Unreachable(
            f"{error.message}; writes continue",
            "grant the Sentinels' user on the servers +failover +client|pause, or check the Sentinels' logs; then "
            "run it again",
        ) from None


def _await_end(block: Redis, choice: PromotionChoice, pause: Pause) -> GroupMember:
    try:
        return await_late_promotion(block, choice)
    except Unreachable as error:
        raise Unreachable(f"{error.message}; writes continue within {LONGEST_SECONDS:.0f} s", error.hint) from None
    except OpsError:
        pause.keep = False
        raise
