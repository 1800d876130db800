"""The servers of one Redis data set, as Sentinels and the servers themselves know each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import redis

from blocks.redis.server import Redis

SECONDS = 2.0
MOST_SERVERS = 32


def found_servers(block: Redis) -> list[str]:
    """`host:port` of every server that answers but for the one that `[redis]` names: what its Sentinels name, and from
    there on the master and the replicas that each server names itself. All are queried at the same time."""
    known = dict.fromkeys([block.address, *block.replicas])
    answered: list[str] = []
    with ThreadPoolExecutor(max_workers=MOST_SERVERS) as pool:
        for told in pool.map(lambda address: _of_sentinel(block, address), block.sentinels):
            known |= dict.fromkeys(told)
        new = list(known)
        while new and len(known) <= MOST_SERVERS:
            peers = list(pool.map(lambda address: _of_server(block.at(address)), new))
            answered += [address for address, found in zip(new, peers, strict=True) if found is not None]
            named = dict.fromkeys(peer for found in peers for peer in found or ())
            new = [address for address in named if address not in known]
            known |= dict.fromkeys(new)
    return [address for address in answered if address != block.address]


def _of_sentinel(block: Redis, address: str) -> list[str]:
    """The master that one Sentinel watches, and its replicas; nothing where it does not answer."""
    try:
        with contextlib.closing(block.sentinel(address, SECONDS)) as client:
            master = cast(dict[str, Any], client.sentinel_master(block.sentinel_master))
            return [_address(one) for one in (master, *client.sentinel_slaves(block.sentinel_master))]
    except (redis.RedisError, OSError, KeyError):
        return []


def _of_server(block: Redis) -> list[str] | None:
    """Whom a server replicates from, and who replicates from it; None where it does not answer."""
    try:
        with contextlib.closing(block.client(answer_seconds=SECONDS)) as client:
            info = client.info("replication")
    except (redis.RedisError, OSError):
        return None
    replicas: Iterable[Mapping[str, Any]] = [
        one for name, one in info.items() if name.startswith("slave") and isinstance(one, dict) and "ip" in one
    ]
    master = [{"ip": info["master_host"], "port": info["master_port"]}] if info.get("master_host") else []
    return [_address(one) for one in (*master, *replicas)]


def _address(found: Mapping[str, Any]) -> str:
    return f"{found['ip']}:{found['port']}"
