"""Data of every type, and an account of it that shares nothing with the code under test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis

BINARY = bytes(range(256))
LONG_MS = 3_600_000


def add_short(clients: dict[int, redis.Redis], milliseconds: int) -> float:
    """100 keys and a field in each database that end soon; returns when all have (this host's clock, seconds)."""
    for client in clients.values():
        with client.pipeline(transaction=False) as pipe:
            pipe.hset("timed", "goes", 2)
            pipe.execute_command("HPEXPIRE", "timed", milliseconds, "FIELDS", 1, "goes")
            for n in range(100):
                pipe.set(f"short:{n}", n, px=milliseconds)
            pipe.execute()
    return time.time() + milliseconds / 1000


def add_short_for(clients: dict[int, redis.Redis], work: Callable[[], object]) -> float:
    """The same, with this done while all of them are there: with longer times where the machine was too slow for it;
    returns when all have ended."""
    for milliseconds in (2500, 10_000, 40_000, 160_000):
        begun = time.time()
        ends = add_short(clients, milliseconds)
        work()
        if time.time() < begun + milliseconds / 1000:
            return ends
    raise AssertionError("it took more than 160 s")


def fill(clients: dict[int, redis.Redis]) -> None:
    """Every type in several databases, binary keys, TTLs of keys and of fields, groups with pending entries."""
    for number, client in clients.items():
        with client.pipeline(transaction=False) as pipe:
            for n in range(300):
                pipe.set(f"session:{n}", f"user {n} of {number}", px=LONG_MS + n)
                pipe.set(f"cache:page:{n}", "x" * 50, px=LONG_MS)
                pipe.set(f"plain:{n}:{number}", n)
            pipe.set(BINARY, BINARY)
            pipe.set(b"", b"an empty name")
            pipe.set("ca*he:star", "dropped")
            pipe.set("cashe:not-a-pattern", "kept")
            pipe.setbit("bits", 70_000, 1)
            pipe.pfadd("visitors", *range(100))
            pipe.rpush("queue", *(f"job {n}\0\n" for n in range(500)), "job 1\0\n")
            pipe.sadd("tags", *(f"tag-{n}" for n in range(200)), BINARY)
            pipe.sadd("numbers", *range(50))
            pipe.zadd("ranking", {"a": 1.1, "b": float("inf"), "c": 0.1 + 0.2, "d": -5})
            pipe.hset("profile", mapping={f"f{n}": f"氏名 {n}" for n in range(300)})
            pipe.hset("timed", mapping={"stays": 1, "long": 3})
            pipe.execute_command("HPEXPIRE", "timed", LONG_MS, "FIELDS", 1, "long")
            pipe.hset("fading", mapping={"only": 1})
            pipe.execute_command("HPEXPIRE", "fading", LONG_MS, "FIELDS", 1, "only")
            for n in range(20):
                pipe.xadd("events", {"kind": "answer", "n": n}, id=f"{n + 1}-1")
            pipe.xdel("events", "3-1")
            pipe.xgroup_create("events", "workers", id="0")
            pipe.xreadgroup("workers", "anna", {"events": ">"}, count=5)
            pipe.xack("events", "workers", "1-1")
            pipe.execute()
        client.function_load("#!lua name=lib\nredis.register_function('f', function() return 1 end)", replace=True)


def account(client: redis.Redis) -> dict[bytes, Any]:
    """Key → (type, PEXPIRETIME, content), read command by command."""
    found = {}
    for key in client.scan_iter(count=1000):
        kind = client.type(key)
        at = client.pexpiretime(key)
        if at != -2:
            found[key] = (kind, at, _content(client, key, kind))
    return found


def _content(client: redis.Redis, key: bytes, kind: bytes) -> Any:
    match kind:
        case b"string":
            return client.get(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1, withscores=True)
        case b"hash":
            fields = {name: (value, client.hpexpiretime(key, name)) for name, value in client.hgetall(key).items()}
            return {name: found for name, found in fields.items() if found[1][0] != -2}  # it ended in between
        case b"stream":
            pending = client.xpending_range(key, "workers", "-", "+", 100)
            return client.xrange(key), [(p["message_id"], p["consumer"], p["times_delivered"]) for p in pending]
    raise AssertionError(kind)


def survivors(before: dict[bytes, Any], now_ms: int | None = None) -> dict[bytes, Any]:
    """What of an account must be there after a restore: not expired since, not of a dropped prefix."""
    now = now_ms or time.time_ns() // 1_000_000
    kept = {}
    for key, (kind, at, content) in before.items():
        if 0 < at <= now or key.startswith((b"cache:", b"ca*he:")):
            continue
        if kind == b"hash":
            content = {name: pair for name, pair in content.items() if not 0 < pair[1][0] <= now}
        kept[key] = (kind, at, content)
    return kept
