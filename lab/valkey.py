"""The lab's Redis, which is Valkey: configuration (manual §2.3) and some data of every kind the application keeps."""

from __future__ import annotations

from urllib.parse import quote

import redis

from lab.binaries import Binaries
from lab.layout import Layout
from lab.processes import Account
from lab.state import State
from lab.supervision import Program

_HOUR = 3600


def url(state: State, database: int = 0) -> str:
    """With the password."""
    return f"redis://:{quote(state.passwords.redis)}@127.0.0.1:{state.ports.redis}/{database}"


def program(layout: Layout, binaries: Binaries, account: Account) -> Program:
    """Valkey under the supervisor: on SIGTERM it saves and ends."""
    return Program(
        "redis",
        (binaries.redis, layout.valkey_conf),
        layout.redis_data.parent,
        user=account.name if account.is_other else "",
    )


def configuration(layout: Layout, state: State) -> str:
    """The text of valkey.conf."""
    return f"""\
# Written by `python -m lab up`; kept as you edit it until the lab's ports change.
bind 127.0.0.1
port {state.ports.redis}
requirepass {state.passwords.redis}
daemonize no
pidfile "{layout.redis_pid}"
dir "{layout.redis_data}"
databases 16
enable-debug-command no

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

maxmemory 512mb
maxmemory-policy noeviction
"""


def fill(state: State) -> int:
    """Sessions, caches and rate limits that expire; queues, hashes and sets that do not; in databases 0 and 1.

    Returns the number of keys; 0 when there is data already, and nothing was written.
    """
    with redis.Redis.from_url(url(state)) as main, redis.Redis.from_url(url(state, 1)) as second:
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
            pipe.set(f"rate_limit:ai:user-{n}", n % 60, ex=_HOUR + n)
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
