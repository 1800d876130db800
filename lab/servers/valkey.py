"""The lab's Redis, which is Valkey: master and replica (manual §2.3), three Sentinels (§8.3), and some data of all
kinds that the application keeps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from lab.processes import OsAccount
from lab.servers.binaries import Binaries
from lab.servers.supervision import Program
from lab.state.layout import Layout
from lab.state.state import LabState

MASTER = "mymaster"
SENTINELS = ("redis-sentinel-1", "redis-sentinel-2", "redis-sentinel-3")
_QUORUM = 2
_DOWN_AFTER_MS = 5000
"""Longer than a restart by the supervisor takes: that is no reason to fail over."""
_UMASK = "077"
"""They rewrite their configuration files, passwords in them, with what this leaves of 0644."""
_HOUR = 3600


def url(state: LabState, database: int = 0) -> str:
    """Of the server that is the master as the lab begins, with the password."""
    return _url(state, state.ports.redis, database)


def master_url(state: LabState, database: int = 0) -> str:
    """Of the server that is the master now: what the Sentinels say, where they say anything."""
    once = Retry(NoBackoff(), 0)  # by default a dead one is asked for 20 s
    places = [("127.0.0.1", port) for port in state.ports.sentinels]
    sentinels = cast(Any, Sentinel)(places, sentinel_kwargs={"socket_timeout": 2, "retry": once})
    port = state.ports.redis
    with contextlib.suppress(MasterNotFoundError):
        port = sentinels.discover_master(MASTER)[1]
    return _url(state, port, database)


def _url(state: LabState, port: int, database: int) -> str:
    return f"redis://:{quote(state.passwords.redis)}@127.0.0.1:{port}/{database}"


def programs(layout: Layout, binaries: Binaries, account: OsAccount) -> list[Program]:
    """Valkey under the supervisor, in starting order: on SIGTERM a server saves and ends."""
    user = account.name if account.is_other else ""
    sentinels = [
        Program(
            name,
            (binaries.redis, layout.sentinel_conf(number), "--sentinel"),
            layout.sentinel_data(number),
            user=user,
            umask=_UMASK,
        )
        for number, name in enumerate(SENTINELS, 1)
    ]
    return [
        Program("redis", (binaries.redis, layout.valkey_conf), layout.redis_data.parent, user=user, umask=_UMASK),
        Program(
            "redis-replica", (binaries.redis, layout.replica_conf), layout.replica_data.parent, user=user, umask=_UMASK
        ),
        *sentinels,
    ]


def configurations(layout: Layout, state: LabState) -> dict[Path, str]:
    """The text of every configuration file. The servers and the Sentinels rewrite theirs at a failover."""
    ports = state.ports
    return {
        layout.valkey_conf: _server(layout, state, ports.redis, layout.redis_data),
        layout.replica_conf: _server(layout, state, ports.redis_replica, layout.replica_data)
        + f"replicaof 127.0.0.1 {ports.redis}\n",
        **{
            layout.sentinel_conf(number): _sentinel(layout, state, port, layout.sentinel_data(number))
            for number, port in enumerate(ports.sentinels, 1)
        },
    }


def _server(layout: Layout, state: LabState, port: int, data: Path) -> str:
    return f"""\
# Written by `python -m lab up`; kept as you edit it until the lab's ports change.
bind 127.0.0.1
port {port}
requirepass {state.passwords.redis}
masterauth {state.passwords.redis}
daemonize no
pidfile "{layout.redis_pid(data)}"
dir "{data}"
databases 16
enable-debug-command no
repl-diskless-sync-delay 0

save 900 1 300 10 60 10000
stop-writes-on-bgsave-error yes
rdbcompression yes
rdbchecksum yes
dbfilename dump.rdb

appendonly yes
appendfilename "appendonly.aof"
appendfsync everysec
auto-aof-rewrite-percentage 100
auto-aof-rewrite-min-size 64mb

maxclients 10000
timeout 300

maxmemory 512mb
maxmemory-policy noeviction
"""


def _sentinel(layout: Layout, state: LabState, port: int, directory: Path) -> str:
    return f"""\
# Written by `python -m lab up`; the Sentinel adds what it learns.
bind 127.0.0.1
port {port}
daemonize no
dir "{directory}"
pidfile "{layout.redis_pid(directory)}"
sentinel monitor {MASTER} 127.0.0.1 {state.ports.redis} {_QUORUM}
sentinel auth-pass {MASTER} {state.passwords.redis}
sentinel down-after-milliseconds {MASTER} {_DOWN_AFTER_MS}
sentinel failover-timeout {MASTER} 10000
"""


def fill(state: LabState) -> int:
    """Sessions, caches and rate limits that expire; queues, hashes and sets that do not; in databases 0 and 1.

    Returns the number of keys; 0 when there is data already, and nothing was written.
    """
    with redis.Redis.from_url(master_url(state)) as main, redis.Redis.from_url(master_url(state, 1)) as second:
        if main.dbsize() or second.dbsize():
            return 0
        _expiring(main)
        _lasting(main)
        with second.pipeline(transaction=False) as pipe:
            for n in range(500):
                pipe.set(f"cache:report:{n}", f"<p>面接レポート {n}</p>" * 8, ex=24 * _HOUR + n)
            for n in range(50):
                pipe.hset(f"feature:{n}", mapping={"enabled": n % 2, "share": n / 50})
            pipe.execute()
        return int(main.dbsize()) + int(second.dbsize())


def _expiring(client: redis.Redis) -> None:
    with client.pipeline(transaction=False) as pipe:
        for n in range(2000):
            pipe.set(
                f"session:{n:06x}", f'{{"user_id": {n % 200}, "role": "candidate", "turn": {n % 30}}}', ex=8 * _HOUR + n
            )
        for n in range(1500):
            pipe.set(f"cache:question:{n}", f"志望動機を教えてください ({n})" * 4, ex=24 * _HOUR + n)
        for n in range(200):
            pipe.set(f"rate_limit:ai:user-{n}", n % 60, ex=_HOUR - n)
        pipe.execute()


def _lasting(client: redis.Redis) -> None:
    with client.pipeline(transaction=False) as pipe:
        for queue in ("transcription", "evaluation", "mail"):
            pipe.rpush(f"queue:{queue}", *(f'{{"job": {n}, "attempt": 0}}' for n in range(200)))
        for n in range(200):
            pipe.hset(
                f"interview:{n}", mapping={"state": "open" if n % 3 else "done", "score": n % 100, "氏名": f"候補者{n}"}
            )
        pipe.zadd("ranking:score", {f"candidate-{n}": n * 1.5 for n in range(500)})
        pipe.sadd("online:users", *(f"user-{n}" for n in range(100)))
        for n in range(100):
            pipe.xadd("stream:events", {"kind": "answer", "session": n})
        pipe.set("binary:key", bytes(range(256)))
        pipe.execute()
