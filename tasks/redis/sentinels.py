"""What the Sentinels say: which server is the master, which follow it, and whether they could fail it over (§8.3).

https://valkey.io/topics/sentinel/
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from blocks.redis import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.log import logger
from tasks.redis.server import at_once, call


@dataclass(frozen=True)
class Follower:
    """A replica, as a Sentinel sees it. `priority` 0: never promoted."""

    address: str
    flags: frozenset[str]
    link_up: bool
    priority: int
    offset: int


@dataclass(frozen=True)
class SentinelView:
    """One Sentinel: `master` is "" where it does not answer (`problem` says why) or does not watch that name."""

    address: str
    problem: str = ""
    master: str = ""
    flags: frozenset[str] = frozenset()
    quorum: int = 0
    others: int = 0
    can_decide: bool = False
    followers: tuple[Follower, ...] = ()
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def answers(self) -> bool:
        """Whether it could be asked."""
        return not self.problem


@dataclass(frozen=True)
class Watch:
    """All Sentinels of an environment."""

    views: tuple[SentinelView, ...]

    @property
    def answering(self) -> tuple[SentinelView, ...]:
        """Those that could be asked."""
        return tuple(view for view in self.views if view.answers)

    @property
    def masters(self) -> dict[str, list[str]]:
        """Address of a master → the Sentinels that name it; "" for those that watch none."""
        told: dict[str, list[str]] = {}
        for view in self.answering:
            told.setdefault(view.master, []).append(view.address)
        return told

    @property
    def master(self) -> str:
        """The address on which all that answer agree; "" where they do not, watch none, or none answers."""
        return next(iter(self.masters)) if len(self.masters) == 1 else ""

    def told(self) -> str:
        """Who says what, for people."""
        return "; ".join(f"{master or 'no master'} by {', '.join(who)}" for master, who in self.masters.items())


@probe
def read_sentinels(block: Redis) -> Watch:
    """Ask all Sentinels, at the same time; one that does not answer is part of the result."""
    return ask_sentinels(block)


def ask_sentinels(block: Redis) -> Watch:
    """See `read_sentinels`."""
    if not block.sentinels:
        return Watch(())
    with ThreadPoolExecutor(max_workers=len(block.sentinels)) as beside:
        return Watch(tuple(beside.map(lambda address: _ask(block, address), block.sentinels)))


def find_master(block: Redis) -> Redis:
    """The server that is the master now, by all Sentinels that answer; the configured one where there are none.

    Raises:
        OpsError: they name different masters.
    """
    watch = ask_sentinels(block)
    if len(watch.masters) > 1:
        raise OpsError(
            f"the Sentinels do not agree on the master: {watch.told()}",
            "wait until a failover has ended; SENTINEL RESET on those that are wrong",
        )
    if not watch.master:
        if block.sentinels:
            logger().warning("no Sentinel names a master of %s: taking %s", block.sentinel_master, block.address)
        return block
    return block.at(watch.master)


def _ask(block: Redis, address: str) -> SentinelView:
    with contextlib.closing(at_once(block.sentinel(address))) as client:
        try:
            state = _state(client, block.sentinel_master)
            if state is None:
                return SentinelView(address)
            followers = [_follower(found) for found in client.sentinel_slaves(block.sentinel_master)]
            return SentinelView(
                address,
                master=f"{state['ip']}:{state['port']}",
                flags=frozenset(str(state["flags"]).split(",")),
                quorum=int(state["quorum"]),
                others=int(state["num-other-sentinels"]),
                can_decide=_can_decide(client, block.sentinel_master),
                followers=tuple(followers),
                settings={name: int(state[name]) for name in SETTINGS if name in state},
            )
        except redis.RedisError as error:
            return SentinelView(address, problem=f"{type(error).__name__}: {error}"[:200])


SETTINGS = ("down-after-milliseconds", "failover-timeout", "parallel-syncs")
"""Of a watched master, beside address and quorum (https://valkey.io/topics/sentinel/#sentinel-api)."""


def _state(client: redis.Redis, name: str) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], client.sentinel_master(name))
    except redis.ResponseError as error:
        if "No such master" in str(error):
            return None
        raise


def _can_decide(client: redis.Redis, name: str) -> bool:
    """SENTINEL CKQUORUM: enough Sentinels for quorum and majority are there."""
    try:
        call(client, "SENTINEL", "CKQUORUM", name)
    except redis.ResponseError:
        return False
    return True


def _follower(found: Any) -> Follower:
    return Follower(
        address=f"{found['ip']}:{found['port']}",
        flags=frozenset(str(found["flags"]).split(",")),
        link_up=str(found.get("master-link-status", "")) == "ok",
        priority=int(found.get("slave-priority", 100)),
        offset=int(found.get("slave-repl-offset", 0)),
    )
