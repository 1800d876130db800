"""The Sentinels' view: the master, its replicas, and whether a failover is possible (§8.3).

https://valkey.io/topics/sentinel/
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from blocks.redis.wire import mistaken
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.log import logger
from tasks.redis.server import at_once, call

_UNABLE = frozenset({"s_down", "o_down", "disconnected"})


@dataclass(frozen=True)
class Follower:
    """A replica, as a Sentinel sees it. `priority` 0: never promoted."""

    address: str
    flags: frozenset[str]
    link_up: bool
    priority: int
    offset: int
    link_down_seconds: float = 0.0
    run_id: str = ""


@dataclass(frozen=True)
class SentinelView:
    """One Sentinel. `master` "": it does not answer (`problem` says why), or does not watch that name."""

    address: str
    problem: str = ""
    master: str = ""
    flags: frozenset[str] = frozenset()
    quorum: int = 0
    others: int = 0
    can_decide: bool = False
    followers: tuple[Follower, ...] = ()
    settings: dict[str, int] = field(default_factory=dict)
    scripts: dict[str, str] = field(default_factory=dict)
    down_seconds: float = 0.0
    master_since_seconds: float = 0.0

    @property
    def answers(self) -> bool:
        """Whether it answers."""
        return not self.problem

    @property
    def statement(self) -> str:
        """Its view of the master, for people."""
        return self.problem or (f"names {self.master}" if self.master else "watches none")

    @property
    def in_progress(self) -> bool:
        """Whether it is carrying out a failover."""
        return "failover_in_progress" in self.flags

    @property
    def sees_down(self) -> bool:
        """Whether it sees the master as down."""
        return bool(self.flags & {"s_down", "o_down"})

    @property
    def promotable(self) -> tuple[Follower, ...]:
        """The replicas that it would promote, best first, by Sentinel's rule and its own data (seconds old).

        https://valkey.io/topics/sentinel/#replica-selection-and-priority
        """
        patience = 10 * self.settings.get("down-after-milliseconds", 30_000) / 1000 + self.down_seconds
        able = [
            found
            for found in self.followers
            if not found.flags & _UNABLE and found.priority and found.link_down_seconds <= patience
        ]
        return tuple(sorted(able, key=lambda found: (found.priority, -found.offset, found.run_id)))


@dataclass(frozen=True)
class Watch:
    """All Sentinels of an environment."""

    views: tuple[SentinelView, ...]

    @property
    def answering(self) -> tuple[SentinelView, ...]:
        """The Sentinels that answer."""
        return tuple(view for view in self.views if view.answers)

    @property
    def masters(self) -> dict[str, list[str]]:
        """Address of a master → the Sentinels that name it; "": those that watch none."""
        named: dict[str, list[str]] = {}
        for view in self.answering:
            named.setdefault(view.master, []).append(view.address)
        return named

    @property
    def master(self) -> str:
        """The address that all answering Sentinels name; "": they disagree, watch none, or none answers."""
        return next(iter(self.masters)) if len(self.masters) == 1 else ""

    @property
    def majority(self) -> int:
        """How many Sentinels a failover needs: the quorum, and more than half of all that know each other."""
        return max((max(view.quorum, (view.others + 1) // 2 + 1) for view in self.answering), default=1)

    def doubt(self, address: str) -> str:
        """Why too few Sentinels name a master; "": enough do, or there are none."""
        naming = self.masters.get(address, [])
        needed = max(self.majority, len(self.views) // 2 + 1)
        if not self.views or len(naming) >= needed:
            return ""
        silent = [f"{view.address}: {view.statement}" for view in self.views if view.address not in naming]
        why = "; ".join(silent) or "the others are not in [redis] sentinels"
        return f"{len(naming)} of {len(self.views)} Sentinels name {address}, {needed} are needed ({why})"

    @property
    def disagreement(self) -> str:
        """Which Sentinels name which master; "" where they agree."""
        return self.describe() if len(self.masters.keys() - {""}) > 1 else ""

    def describe(self) -> str:
        """Which Sentinels name which master, for people."""
        return "; ".join(f"{master or 'no master'} by {', '.join(who)}" for master, who in self.masters.items())


@probe
def read_sentinels(block: Redis) -> Watch:
    """Query all Sentinels in parallel; one that does not answer is part of the result."""
    return ask_sentinels(block)


def ask_sentinels(block: Redis) -> Watch:
    """See `read_sentinels`."""
    if not block.sentinels:
        return Watch(())
    with ThreadPoolExecutor(max_workers=len(block.sentinels)) as pool:
        return Watch(tuple(pool.map(lambda address: _ask(block, address), block.sentinels)))


def find_master(block: Redis) -> Redis:
    """The master by all Sentinels that watch one; without such Sentinels the configured server.

    Raises:
        OpsError: they name different masters.
    """
    return master_by(block, ask_sentinels(block))


def master_by(block: Redis, watch: Watch) -> Redis:
    """See `find_master`, for a watch that was read before."""
    named = [master for master in watch.masters if master]
    if len(named) > 1:
        raise OpsError(
            f"the Sentinels do not agree on the master: {watch.describe()}",
            "wait until the failover ends; SENTINEL RESET on the wrong ones",
        )
    if not named:
        if block.sentinels:
            logger().warning("no Sentinel names a master of %s: using %s", block.sentinel_master, block.address)
        return block
    return block.at(named[0])


def require_master(block: Redis, address: str, *, waived: bool = False) -> None:
    """The server is still the master.

    Raises:
        OpsError: a Sentinel names another master; or (unless waived) too few name this one.
    """
    watch = ask_sentinels(block)
    others = sorted({master for master in watch.masters if master not in ("", address)})
    if others:
        raise OpsError(
            f"{address} is no longer the master: the Sentinels name {', '.join(others)}",
            "run it again: it continues on the new master",
        )
    if not waived and (doubt := watch.doubt(address)):
        raise OpsError(f"too few Sentinels name the master now: {doubt}", "run it again when they do")


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
                flags=_flags(state),
                quorum=int(state["quorum"]),
                others=int(state["num-other-sentinels"]),
                can_decide=_can_decide(client, block.sentinel_master),
                followers=tuple(followers),
                settings={name: int(state[name]) for name in SETTINGS if name in state},
                scripts={name: str(state[name]) for name in SCRIPTS if state.get(name)},
                down_seconds=int(state.get("s-down-time", 0)) / 1000,
                master_since_seconds=int(state.get("role-reported-time", 0)) / 1000,
            )
        except redis.RedisError as error:
            wrong = mistaken(address, tls=block.tls)
            return SentinelView(address, problem=wrong or f"{type(error).__name__}: {error}"[:200])


SETTINGS = ("down-after-milliseconds", "failover-timeout", "parallel-syncs")
"""Settings of a watched master, besides address and quorum (https://valkey.io/topics/sentinel/#sentinel-api)."""
SCRIPTS = (
    "notification-script",
    "client-reconfig-script",
)  # can be set at run time only without `deny-scripts-reconfig`


def _state(client: redis.Redis, name: str) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], client.sentinel_master(name))
    except redis.ResponseError as error:
        if "No such master" in str(error):
            return None
        raise


def _can_decide(client: redis.Redis, name: str) -> bool:
    """SENTINEL CKQUORUM: enough Sentinels answer for quorum and majority."""
    try:
        call(client, "SENTINEL", "CKQUORUM", name)
    except redis.ResponseError:
        return False
    return True


def _follower(found: Any) -> Follower:
    return Follower(
        address=f"{found['ip']}:{found['port']}",
        flags=_flags(found),
        link_up=str(found.get("master-link-status", "")) == "ok",
        priority=int(found.get("slave-priority", 100)),
        offset=int(found.get("slave-repl-offset", 0)),
        link_down_seconds=int(found.get("master-link-down-time", 0)) / 1000,
        run_id=str(found.get("runid", "")),
    )


def _flags(state: Mapping[str, Any]) -> frozenset[str]:
    """redis-py gives a string, and with RESP3 a set."""
    flags = state["flags"]
    return frozenset(flags.split(",") if isinstance(flags, str) else flags)
