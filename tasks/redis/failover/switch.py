"""The step of a planned failover in which the Sentinels switch, while writes on the old master stand still (§8.3)."""

from __future__ import annotations

import contextlib

from blocks.redis import Redis
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.log import logger
from tasks.redis.failover.command import How, begin_failover
from tasks.redis.failover.group import Member, quick
from tasks.redis.failover.pause import LONGEST_SECONDS, Pause
from tasks.redis.failover.promotion import Choice, await_late_promotion, await_promotion, views
from tasks.redis.sentinels import Watch
from tasks.redis.server import call

LEAST_SWITCH_SECONDS, MOST_SWITCH_SECONDS = 3.0, 20.0


def begin_switch(block: Redis, choice: Choice, pause: Pause) -> How:
    """The Sentinels are asked, while writes stand still for sure, and only where none of them has begun by itself.

    Raises:
        OpsError: it was not begun; writes go on.
        Unreachable: the Sentinel did not answer; it may have begun.
    """
    watch = Watch(views(block, choice))
    if watch.master != choice.master or any(view.in_progress for view in watch.answering):
        raise OpsError(f"the Sentinels have moved meanwhile: {watch.told()}; writes go on", "launch it again")
    if not pause.unbroken:
        raise OpsError("this run stood still for longer than the pause of writes; writes go on", "launch it again")
    pause.hold(LONGEST_SECONDS)
    pause.keep = True
    failpoint("failover: held")
    try:
        return begin_failover(block, choice.sentinels[0], coordinated=choice.coordinated)
    except Unreachable:  # it may have begun
        raise
    except OpsError:
        pause.keep = False
        raise


def await_switch(block: Redis, choice: Choice, how: How, pause: Pause) -> Member:
    """No longer than the Sentinels would bear the pause, where it can be called off. One that was forced cannot: writes
    that went on before it has ended would be lost.

    Raises:
        OpsError: nobody was promoted, and nobody will be; writes go on.
        Unreachable: nobody was promoted in time.
    """
    seconds = min(max(2 * choice.pause_seconds, LEAST_SWITCH_SECONDS), MOST_SWITCH_SECONDS)
    if how == "coordinated":
        # Its FAILOVER may stand behind a PUBLISH of the Sentinel's, and that behind our pause, until that has ended.
        # It pauses writes itself, and hands over only when the candidate has every byte.
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
            f"{error.message}; writes go on",
            "give the Sentinels' own user on the servers +failover +client|pause, or look at the Sentinels' logs; then "
            "launch it again",
        ) from None


def _await_end(block: Redis, choice: Choice, pause: Pause) -> Member:
    try:
        return await_late_promotion(block, choice)
    except Unreachable as error:
        raise Unreachable(f"{error.message}; writes go on within {LONGEST_SECONDS:.0f} s", error.hint) from None
    except OpsError:
        pause.keep = False
        raise
