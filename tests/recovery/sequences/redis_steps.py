"""The steps of Redis: its settings, its accidents, its restore and the undo of it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time

import redis

from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tests.recovery.sequences.checks import compare
from tests.recovery.sequences.confirmation import carry_out
from tests.recovery.sequences.promises import REDIS
from tests.recovery.sequences.settlement import newest_kept, settle
from tests.recovery.sequences.steps import NOT_POSSIBLE, step
from tests.recovery.sequences.world import World


def configured(world: World, setting: str, value: str) -> str:
    """Change a running setting, which the configuration file does not know; returns it."""
    with contextlib.suppress(redis.RedisError):
        world.redis().config_set(setting, value)
        return value or "empty"
    return NOT_POSSIBLE


@step("redis-aof", "quiet", 0.6)
def redis_aof(world: World, chance: random.Random) -> str:
    """Somebody switches the AOF off or on while Redis runs."""
    return configured(world, "appendonly", chance.choice(["no", "no", "yes"]))


@step("redis-save", "quiet", 0.4)
def redis_save(world: World, chance: random.Random) -> str:
    """Somebody switches the automatic saves off or on."""
    return configured(world, "save", chance.choice(["", "", "900 1"]))


@step("crash-redis", "quiet", 0.5)
def crash_redis(world: World, chance: random.Random) -> str:
    """kill -9 of Redis; its supervisor starts it again, from whatever its files have."""
    if pid := world.system.supervisor.services()["redis"].pid:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Unreachable, OpsError):
            until(lambda: world.redis_pid not in (0, pid) and world.redis_answers(), what="Redis", seconds=30)
        return note_crash(world)
    return NOT_POSSIBLE


def note_crash(world: World) -> str:
    """What the crash itself lost is no recovery's fault: those writes may be restored or not."""
    ledger = world.ledgers[REDIS]
    content = ledger.store.read()
    lost = compare(ledger, ledger.copy(), content).lost if content else []
    numbers = {one.attempt for one in lost}
    for write in ledger.writes:
        if write.attempt in numbers:
            write.outcome = "indeterminate"
    return f"lost {len(lost)}" if lost else ""


# Accidents


@step("kill-redis", "accident", 1)
def kill_redis(world: World, chance: random.Random) -> str:
    """kill -9 of Redis, which stays dead."""
    pid = world.redis_pid
    if not pid:
        return NOT_POSSIBLE
    os.kill(pid, signal.SIGSTOP)  # asked to stop it while it cannot hear the signal
    world.system.supervisor._call("stopProcess", "redis", False)
    os.kill(pid, signal.SIGKILL)
    until(lambda: "redis" not in world.running(), what="the death of Redis", seconds=30, every_seconds=0.02)
    return ""


@step("flush-redis", "accident", 0.7)
def flush_redis(world: World, chance: random.Random) -> str:
    """FLUSHALL."""
    ledger = world.ledgers["Redis"]
    accident = ledger.note(None)
    try:
        world.redis().flushall()
    except redis.RedisError:
        ledger.writes.remove(accident)
        return NOT_POSSIBLE
    accident.outcome, accident.answered = "acknowledged", time.time()
    return ""


@step("remove-redis-data", "accident", 0.7)
def remove_redis_data(world: World, chance: random.Random) -> str:
    """Redis is stopped, and its data directory is missing."""
    world.system.supervisor.stop("redis")
    data = world.system.layout.redis_data
    if not data.exists():
        return NOT_POSSIBLE
    shutil.rmtree(data)
    return ""


# Recoveries


@step("restore-redis", "recovery", 0.6)
def restore_redis(world: World, chance: random.Random) -> str:
    """Redis alone, from its newest backup."""
    return _restore(world, chance, source="backup")


@step("restore-redis-replica", "recovery", 0.4, "replica")
def restore_redis_replica(world: World, chance: random.Random) -> str:
    """Redis alone, from its replica."""
    return _restore(world, chance, source="replica")


def _restore(world: World, chance: random.Random, source: str) -> str:
    data = world.system.layout.redis_data
    kept, before = newest_kept(data), world.ledgers[REDIS].copy() if world.redis_answers() else None
    carried = carry_out(world, chance, "restore-redis", redis_source=source)
    settle(world, carried)
    if newest_kept(data) != kept:
        world.tokens["kept Redis"] = None if carried.kept_is_unknown else before
    return carried.ran.status


@step("undo-restore-redis", "recovery", 0.8)
def undo_restore_redis(world: World, chance: random.Random) -> str:
    """The data that the last restore of Redis replaced."""
    kept = world.tokens.get("kept Redis")
    if not kept or not world.redis_answers():
        return NOT_POSSIBLE
    now = world.ledgers[REDIS].copy()
    carried = carry_out(world, chance, "undo-restore-redis")
    settle(world, carried, back_to={REDIS: kept})
    world.tokens["kept Redis"] = now
    return carried.ran.status
