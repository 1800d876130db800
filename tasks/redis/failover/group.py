"""The servers of one data set: their state, and their replication offsets (§8.3).

https://valkey.io/topics/replication/
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from tasks.redis.sentinels import Follower, SentinelView, Watch, ask_sentinels
from tasks.redis.server import at_once, call

# A suspended server accepts connections but does not answer.
ANSWER_SECONDS = 2.0
ROUND_TRIP_SECONDS = 0.5


@dataclass(frozen=True)
class GroupMember:
    """One server. `offset`: its bytes of the replication stream; `silent_seconds`: since it last heard its master.

    `problem`: why it could not be queried; `dead`: nothing answered. After a promotion it keeps the id of the earlier
    stream, `earlier_replid`, and its offset in it, `promoted_at` (-1: never promoted).
    """

    address: str
    problem: str = ""
    hint: str = ""
    dead: bool = False
    version: str = ""
    role: str = ""
    replid: str = ""
    offset: int = 0
    earlier_replid: str = ""
    promoted_at: int = -1
    follows: str = ""
    link_up: bool = False
    syncing: bool = False
    loading: bool = False
    silent_seconds: int = 0
    priority: int = 0
    lags: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_master(self) -> bool:
        """Whether it reports the role master."""
        return self.role == "master"

    def is_in_sync_with(self, master: GroupMember) -> bool:
        """Whether it follows that master's stream, by its id, and has the bytes that the master had when it was
        queried."""
        same = self.replid == master.replid and not self.is_master
        return same and self.link_up and not self.syncing and self.offset >= master.offset


@dataclass(frozen=True)
class Group:
    """The Sentinels' views, and every server that they know, by address."""

    watch: Watch
    members: Mapping[str, GroupMember]

    @property
    def master(self) -> GroupMember | None:
        """The master that all Sentinels name."""
        return self.members.get(self.watch.master)

    @property
    def others(self) -> tuple[GroupMember, ...]:
        """All servers except the master."""
        return tuple(member for member in self.members.values() if member.address != self.watch.master)

    def seen_by(self, view: SentinelView, address: str) -> Follower | None:
        """A replica as one Sentinel sees it."""
        return next((found for found in view.followers if found.address == address), None)


@probe
def read_group(block: Redis) -> Group:
    """Query all Sentinels, then all servers that they know, in parallel."""
    return ask_group(block)


def ask_group(block: Redis) -> Group:
    """See `read_group`."""
    watch = ask_sentinels(block)
    known = [view.master for view in watch.answering if view.master]
    known += [found.address for view in watch.answering for found in view.followers]
    addresses = list(dict.fromkeys(known))
    with ThreadPoolExecutor(max_workers=max(1, len(addresses))) as pool:
        found = pool.map(lambda address: read_member(block, address), addresses)
        return Group(watch, dict(zip(addresses, found, strict=True)))


def read_member(block: Redis, address: str) -> GroupMember:
    """One server; an error is part of the result."""
    try:
        with quick(block.at(address)) as client:
            try:
                info = client.info("server", "replication", "persistence")
            except redis.ConnectionError:  # a Sentinel that changes its role closes its connections
                info = client.info("server", "replication", "persistence")
            return member_of(address, info)
    except OpsError as error:
        return GroupMember(address, error.message, error.hint, isinstance(error, Unreachable))


@contextlib.contextmanager
def quick(block: Redis) -> Iterator[redis.Redis]:
    """A client with a timeout of `ANSWER_SECONDS` and translated errors.

    Raises:
        Unreachable: the server does not answer.
        OpsError: it refuses.
    """
    client = quick_client(block)
    try:
        yield client
    except redis.RedisError as error:
        raise block.refused(error) from None
    finally:
        client.close()


def quick_client(block: Redis) -> redis.Redis:
    """See `quick`; without its translation of errors."""
    client = at_once(block.client())
    seconds = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS}
    client.connection_pool.connection_kwargs.update(seconds)
    return client


def member_of(address: str, info: Mapping[str, Any]) -> GroupMember:
    """From INFO server, replication, persistence."""
    is_master = info["role"] == "master"
    earlier = str(info.get("master_replid2", "")).strip("0")
    broken = int(info.get("master_link_down_since_seconds", -1))
    return GroupMember(
        address,
        version=_version(info),
        role=str(info["role"]),
        replid=str(info.get("master_replid", "")),
        offset=int(info["master_repl_offset"] if is_master else info.get("slave_repl_offset", 0)),
        earlier_replid=str(info["master_replid2"]) if earlier else "",
        promoted_at=int(info.get("second_repl_offset", -1)) - 1 if earlier else -1,
        follows="" if is_master else f"{info['master_host']}:{info['master_port']}",
        link_up=str(info.get("master_link_status", "")) == "up",
        syncing=bool(info.get("master_sync_in_progress", 0)),
        loading=bool(info.get("loading", 0)),
        silent_seconds=0 if is_master else max(broken, int(info.get("master_last_io_seconds_ago", -1)), 0),
        priority=int(info.get("slave_priority", 100)),
        lags={
            f"{found['ip']}:{found['port']}": int(found.get("lag", 0))
            for name, found in info.items()
            if name.startswith("slave") and isinstance(found, dict) and "offset" in found
        },
    )


def _version(info: Mapping[str, Any]) -> str:
    server = "valkey" if info.get("server_name") == "valkey" else "redis"
    return f"{server} {info.get(f'{server}_version', '')}"


@dataclass(frozen=True)
class LastSeen:
    """The master's last INFO at a Sentinel, read at `at` (this host's clock, seconds; rather too early)."""

    address: str
    offset: int
    replid: str
    at: float
    operations_per_second: float
    version: str


def read_last_seen(block: Redis, watch: Watch) -> LastSeen | None:
    """The newest INFO of the master at any Sentinel; None: no Sentinel has one.

    A Sentinel keeps it after the master's death (SENTINEL INFO-CACHE), until a failover ends. Every write acknowledged
    before `at` is before `offset` in the replication stream.
    """
    found = [seen for view in watch.answering if view.master for seen in [_last_seen(block, view)] if seen]
    return max(found, key=lambda seen: (seen.offset, seen.at), default=None)


def _last_seen(block: Redis, view: SentinelView) -> LastSeen | None:
    asked = time.time()
    try:
        with contextlib.closing(at_once(block.sentinel(view.address))) as client:
            reply = call(client, "SENTINEL", "INFO-CACHE", block.sentinel_master)
    except redis.RedisError:
        return None
    if len(reply) < 2 or not reply[1] or not reply[1][0][1]:
        return None
    age, text = reply[1][0]
    info = dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)
    if info.get("role") != "master":
        return None
    return LastSeen(
        address=view.master,
        offset=int(info.get("master_repl_offset", 0)),
        replid=info.get("master_replid", ""),
        at=asked - age / 1000 - ROUND_TRIP_SECONDS,
        operations_per_second=float(info.get("instantaneous_ops_per_sec", 0)),
        version=_version(info),
    )
