"""What stands around a server: replicas and Sentinels, as they are and as a killed restore left them (§2.3, §8.3)."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import redis

from blocks.redis import Redis
from runbook import record
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from tasks.redis.rights import find_refused
from tasks.redis.sentinels import Watch, ask_sentinels
from tasks.redis.server import connected

RECORD = "redis-detached.json"
NOWHERE = ("127.0.0.1", 1)
"""No server listens on port 1: a replica of it keeps what it has."""
DEAD = frozenset({"s_down", "o_down", "disconnected"})


@dataclass(frozen=True)
class Watcher:
    """One Sentinel, and how it watched the master."""

    address: str
    quorum: int
    settings: dict[str, int]


@dataclass(frozen=True)
class Surroundings:
    """What stands around a server. `own` is its address as the others know it; `master` the one that is the master now,
    "" where nobody says; `others` every other server of the data set; `lost` those of them that do not answer, and
    `silent` the Sentinels that do not."""

    own: str
    master: str = ""
    others: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    watchers: tuple[Watcher, ...] = ()
    silent: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    since: str = ""
    swapped: bool = False
    disagreement: str = ""

    @property
    def is_alone(self) -> bool:
        """Nothing is to be taken off."""
        return not self.others and not self.watchers

    @property
    def reachable(self) -> tuple[str, ...]:
        """The other servers that answer."""
        return tuple(address for address in self.others if address not in self.lost)

    @property
    def dangerous(self) -> tuple[str, ...]:
        """Other servers that do not answer here, while no Sentinel holds them for dead: clients may reach them."""
        return tuple(address for address in self.lost if address not in self.down)


@probe
def read_surroundings(block: Redis, reports: Path) -> Surroundings:
    """Ask the server, its replicas and its Sentinels; what a killed run took off counts as if it were still there."""
    watch = ask_sentinels(block)
    own, master = _own_address(block, watch), watch.master
    known = {address for view in watch.answering for address in (view.master, *(f.address for f in view.followers))}
    with contextlib.suppress(OpsError), connected(block) as client:
        known |= {*_replicas(client), _master_of(client)}
    others = {address for address in {*known, *block.replicas} if address and not is_own(block, address)}
    found = Surroundings(
        own,
        master,
        tuple(sorted(others)),
        watchers=tuple(Watcher(v.address, v.quorum, v.settings) for v in watch.answering if v.master),
        silent=tuple(view.address for view in watch.views if not view.answers),
        down=tuple(sorted({*_down(watch)})),
        disagreement=watch.told() if len(watch.masters.keys() - {""}) > 1 else "",
    )
    if kept := find_record(reports):
        found = _merged(kept, found)
    return replace(found, lost=tuple(address for address in found.others if not _answers(block.at(address))))


def find_record(reports: Path) -> Surroundings | None:
    """What a restore took off and did not put back.

    Raises:
        OpsError: the record cannot be read.
    """
    return record.read(reports / RECORD, Surroundings, "register the Sentinels by hand, then remove it")


@probe
def find_unruly(block: Redis, around: Surroundings) -> tuple[str, ...]:
    """The other servers that would refuse to be taken off, as sentences; nothing is changed.

    Raises:
        Unreachable: one went away.
    """
    found = []
    for address in around.reachable:
        with connected(server := block.at(address)) as client:
            refused = find_refused(client, server, ("REPLICAOF", *map(str, NOWHERE)))
        found += [f"{address}: {error.message}" for error in refused]
    return tuple(found)


def _merged(kept: Surroundings, now: Surroundings) -> Surroundings:
    """Sentinels that a killed run made forget the master say nothing now: what it wrote down counts."""
    watching = {watcher.address: watcher for watcher in (*kept.watchers, *now.watchers)}
    return replace(
        now,
        own=kept.own,
        master=now.master or kept.master,
        others=tuple(sorted({*kept.others, *now.others} - {kept.own})),
        watchers=tuple(watching.values()),
        down=tuple({*kept.down, *now.down}),
        since=kept.since,
        swapped=kept.swapped,
    )


def _own_address(block: Redis, watch: Watch) -> str:
    """As the Sentinels or the replicas know it: an address that they can reach."""
    told = [a for view in watch.answering for a in (view.master, *(f.address for f in view.followers)) if a]
    own = [address for address in told if is_own(block, address)]
    if own:
        return own[0]
    with contextlib.suppress(OSError):
        return f"{socket.gethostbyname(block.host)}:{block.port}"
    return block.address


def is_own(block: Redis, address: str) -> bool:
    """Whether an address that another server gives is that of this one."""
    host, _, port = address.rpartition(":")
    if int(port) != block.port:
        return False
    if host == block.host:
        return True
    with contextlib.suppress(OSError):
        resolved = {str(found[4][0]) for found in socket.getaddrinfo(block.host, block.port)}
        if any(name.startswith("127.") or name == "::1" for name in resolved):
            resolved |= {found.address for addresses in psutil.net_if_addrs().values() for found in addresses}
        return host in resolved
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
    told = (info.get("master_host"), info.get("master_port"))
    return f"{told[0]}:{told[1]}" if info["role"] == "slave" and told != NOWHERE else ""


def _answers(server: Redis) -> bool:
    try:
        with connected(server):
            return True
    except Unreachable:
        return False
