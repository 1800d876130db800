"""A server's replicas and Sentinels, now and as a killed restore left them (§2.3, §8.3)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import psutil
import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.files import record
from runbook.kinds import probe
from runbook.wait import until
from tasks.redis.restore.swap import STAMP, SUPERSEDED, superseded_redis
from tasks.redis.sentinels import Watch, ask_sentinels
from tasks.redis.server import connected, live_directory

RECORD = "redis-detached.json"
AGREE_SECONDS = 20.0
NOWHERE = ("127.0.0.1", 1)
"""No server listens on port 1: a replica of it keeps its data."""
DEAD = frozenset({"s_down", "o_down", "disconnected"})


@dataclass(frozen=True)
class SentinelWatch:
    """One Sentinel, and its settings for the master; `scripts`: by setting."""

    address: str
    quorum: int
    settings: dict[str, int]
    scripts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplicationTopology:
    """A server's replicas and Sentinels. `own`: its address as the others know it; `master`: the current master, "":
    unknown; `others`: every other server of the data set; `lost`: those that do not answer; `silent`: Sentinels that do
    not answer. `since`: when a run detached them, "" once the master serves again. `priorities`: the replica-priority
    of the servers that have 0 until they are in sync."""

    own: str
    master: str = ""
    others: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    watchers: tuple[SentinelWatch, ...] = ()
    silent: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    since: str = ""
    swapped: bool = False
    disagreement: str = ""
    unlisted: str = ""
    priorities: dict[str, str] = field(default_factory=dict)

    @property
    def is_alone(self) -> bool:
        """There is nothing to detach."""
        return not self.others and not self.watchers

    @property
    def reachable(self) -> tuple[str, ...]:
        """The other servers that answer."""
        return tuple(address for address in self.others if address not in self.lost)

    @property
    def dangerous(self) -> tuple[str, ...]:
        """Other servers that do not answer, but that no Sentinel reports as down: clients may reach them."""
        return tuple(address for address in self.lost if address not in self.down)


@probe
def read_topology(block: Redis, reports: Path, *, of_dead: bool = False) -> ReplicationTopology:
    """Query the server, its replicas and its Sentinels; servers that a killed run detached are included. `of_dead`:
    that run was for a dead server, so only its list of detached servers is used."""
    watch, kept = _agreed(block), find_record(reports)
    known = {address for view in watch.answering for address in (view.master, *(f.address for f in view.followers))}
    with contextlib.suppress(OpsError), connected(block) as client:
        known |= {*_replicas(client), _master_of(client)}
    known = {address for address in {*known, *block.replicas, *(kept.others if kept else ())} if address}
    run_ids = {address: _run_id(block.at(address)) for address in known if not is_own(block, address)}
    live = ""
    with contextlib.suppress(OpsError):
        live = _run_id(block)
    others = {address for address, run_id in run_ids.items() if not run_id or run_id != live}
    found = ReplicationTopology(
        own := _own_address(block, watch, others),
        own if watch.master and watch.master not in others else watch.master,
        tuple(sorted(others)),
        watchers=tuple(SentinelWatch(v.address, v.quorum, v.settings, v.scripts) for v in watch.answering if v.master),
        silent=tuple(view.address for view in watch.views if not view.answers),
        down=tuple(sorted({*_down(watch)})),
        disagreement=watch.disagreement,
        unlisted=_unlisted(block, watch),
    )
    if kept and not of_dead:
        found = _merged(block, kept, found)
    return replace(found, lost=tuple(address for address in found.others if not run_ids.get(address)))


def _agreed(block: Redis) -> Watch:
    """The Sentinels' answers when they agree on the master. The last ones after AGREE_SECONDS: a failover that has just
    ended is known to one Sentinel before the others."""
    last = ask_sentinels(block)

    def agree() -> bool:
        nonlocal last
        last = last if not last.disagreement else ask_sentinels(block)
        return not last.disagreement

    with contextlib.suppress(Unreachable):
        until(agree, what="the Sentinels' agreement", seconds=AGREE_SECONDS)
    return last


def find_record(reports: Path) -> ReplicationTopology | None:
    """The record of servers that a restore detached and did not attach.

    Raises:
        OpsError: the record cannot be read.
    """
    return record.read(reports / RECORD, ReplicationTopology, "register the Sentinels by hand, then delete it")


def _merged(block: Redis, kept: ReplicationTopology, now: ReplicationTopology) -> ReplicationTopology:
    """Sentinels that forgot the master in a killed run know nothing now: use its record, without Sentinels that the
    environment no longer names."""
    watching = {watcher.address: watcher for watcher in (*kept.watchers, *now.watchers)}
    return replace(
        now,
        own=kept.own,
        master=kept.own if now.master == now.own else now.master or kept.master,
        others=tuple(sorted({*now.others} - {kept.own})),
        watchers=tuple(watcher for address, watcher in watching.items() if address in block.sentinels),
        down=tuple({*kept.down, *now.down}),
        since=kept.since,
        swapped=kept.swapped or _was_swapped(block, kept.since),
        priorities=kept.priorities,
    )


def _was_swapped(block: Redis, since: str) -> bool:
    """Whether data was swapped since then: a run can be killed before it records that."""
    taken = f"{live_directory(block).name}{SUPERSEDED}{datetime.fromisoformat(since):{STAMP}}" if since else ""
    aside = [] if block.remote else superseded_redis(block)
    return bool(taken) and live_directory(block).exists() and any(path.name >= taken for path in aside)


def _unlisted(block: Redis, watch: Watch) -> str:
    """Sentinels that are not configured here: they would still fail over the master and name it to clients."""
    most = max(((view.others + 1, view.address) for view in watch.answering if view.master), default=(0, ""))
    listed = len(block.sentinels)
    return (
        f"{most[1]} knows {most[0]} Sentinels including itself; [redis] sentinels has {listed}"
        if most[0] > listed
        else ""
    )


def _own_address(block: Redis, watch: Watch, others: Collection[str]) -> str:
    """The server's address as the Sentinels or the replicas know it."""
    named = [a for view in watch.answering for a in (view.master, *(f.address for f in view.followers)) if a]
    own = [address for address in named if address not in others]
    if own:
        return own[0]
    with contextlib.suppress(OSError):
        return f"{socket.gethostbyname(block.host)}:{block.port}"
    return block.address


def is_own(block: Redis, address: str) -> bool:
    """Whether another server's address is this server's."""
    host, _, port = address.rpartition(":")
    if int(port) != block.port:
        return False
    if host == block.host:
        return True
    with contextlib.suppress(OSError):
        resolved = {str(found[4][0]) for found in socket.getaddrinfo(block.host, block.port)}
        if any(name.startswith("127.") or name == "::1" for name in resolved):
            resolved |= {found.address for addresses in psutil.net_if_addrs().values() for found in addresses}
        return host in resolved or bool(resolved & {str(found[4][0]) for found in socket.getaddrinfo(host, block.port)})
    return False


def _down(watch: Watch) -> list[str]:
    return [
        address
        for view in watch.answering
        for address, flags in ((view.master, view.flags), *((f.address, f.flags) for f in view.followers))
        if flags & DEAD
    ]


def _replicas(client: redis.Redis) -> set[str]:
    info = client.info("replication")
    found = [value for key, value in info.items() if key.startswith("slave") and isinstance(value, dict)]
    return {f"{state['ip']}:{state['port']}" for state in found}


def _master_of(client: redis.Redis) -> str:
    info = client.info("replication")
    master = (info.get("master_host"), info.get("master_port"))
    return f"{master[0]}:{master[1]}" if info["role"] == "slave" and master != NOWHERE else ""


def _run_id(server: Redis) -> str:
    """The run id of the server at an address; "": none answers."""
    try:
        with connected(server) as client:
            return str(client.info("server")["run_id"])
    except Unreachable:
        return ""
