"""The servers and Sentinels that would refuse to be detached or attached, checked before a restore (§2.3, §8.3)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import redis

from blocks.redis.server import Redis
from runbook.errors import Unreachable
from runbook.kinds import probe
from tasks.redis.rights import find_refused
from tasks.redis.server import at_once, call, connected
from tasks.redis.topology.followers import NEVER, PRIORITY
from tasks.redis.topology.topology import NOWHERE, ReplicationTopology

NOBODY = "ops:nobody"
"""No Sentinel watches a master of that name: a command about it changes nothing, and rights are checked first."""
_ASKED = (
    ("SENTINEL", "REMOVE", NOBODY),
    ("SENTINEL", "MONITOR", NOBODY, *map(str, NOWHERE), "0"),  # a quorum of 0 is refused
    ("SENTINEL", "SET", NOBODY, "parallel-syncs", "1"),
    ("SENTINEL", "CKQUORUM", NOBODY),
)


@dataclass(frozen=True)
class RefusingServers:
    """Sentences: `refusing` cannot be detached or attached; `forgetting` would forget their master at a restart."""

    refusing: tuple[str, ...]
    forgetting: tuple[str, ...]


@probe
def find_refusing_servers(block: Redis, around: ReplicationTopology) -> RefusingServers:
    """The other servers, the Sentinels and (if it answers) this server that refuse a command needed to detach or attach
    them. Nothing is changed.

    Raises:
        Unreachable: another server stopped answering.
    """
    refusing, forgetting = [], []
    for address in around.reachable:
        with connected(server := block.at(address)) as client:
            refusing += _told(client, server, "REPLICAOF", *map(str, NOWHERE))
            refusing += _told(client, server, "CONFIG", "SET", PRIORITY, NEVER)
            forgetting += _told(client, server, "CONFIG", "REWRITE")
    with contextlib.suppress(Unreachable), connected(block) as client:
        refusing += _told(client, block, "REPLICAOF", "NO", "ONE")
        forgetting += _told(client, block, "CONFIG", "REWRITE")
    for watcher in around.watchers:
        refusing += _refused_by_sentinel(block, watcher.address)
    return RefusingServers(tuple(refusing), tuple(forgetting))


def _told(client: redis.Redis, server: Redis, *words: str) -> list[str]:
    return [f"{error.message}: {error.hint}" for error in find_refused(client, server, words)]


def _refused_by_sentinel(block: Redis, address: str) -> list[str]:
    """A server that does not answer is left out."""
    found = []
    with contextlib.closing(at_once(block.sentinel(address))) as client:
        for words in _ASKED:
            try:
                call(client, *words)
            except redis.exceptions.NoPermissionError:
                what = f"Sentinel {address} forbids this user {' '.join(words[:2])}"
                found.append(f"{what}: ACL SETUSER … +{'|'.join(words[:2]).lower()}")
            except redis.RedisError:
                continue
    return found
