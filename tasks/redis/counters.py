"""The counters of a rate limiter (§5.3): how many requests each user has left, and which counters never end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.content.reading import shown
from tasks.redis.keys import read_prefix, under
from tasks.redis.memory.listing import matching
from tasks.redis.server import call, connected

MOST_KEPT = 1000


@dataclass(frozen=True)
class Counter:
    """One key. `count` None: its value is no integer; `ttl_seconds` -1: it never expires."""

    database: int
    key: str
    count: int | None
    ttl_seconds: float


@dataclass
class Some:
    """The number of counters of a kind, and the first of them."""

    count: int = 0
    first: list[Counter] = field(default_factory=list)

    def add(self, counter: Counter) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < MOST_KEPT:
            self.first.append(counter)


@dataclass
class CountedCalls:
    """The counters of one prefix. A counter is `over` or `near`, and can also be `lasting` (no TTL; `locked` if it is
    over too), `long` (a longer TTL than the window) or `unreadable`."""

    prefix: str
    most: int
    window_seconds: int
    keys: int = 0
    over: Some = field(default_factory=Some)
    near: Some = field(default_factory=Some)
    lasting: Some = field(default_factory=Some)
    locked: Some = field(default_factory=Some)
    long: Some = field(default_factory=Some)
    unreadable: Some = field(default_factory=Some)

    def add(self, counter: Counter, near_ratio: float) -> None:
        """Count one more."""
        self.keys += 1
        if counter.count is None:
            self.unreadable.add(counter)
        elif counter.count >= self.most:
            self.over.add(counter)
        elif counter.count >= near_ratio * self.most:
            self.near.add(counter)
        if counter.ttl_seconds < 0:
            self.lasting.add(counter)
            if counter.count is not None and counter.count >= self.most:
                self.locked.add(counter)
        elif counter.ttl_seconds > self.window_seconds:
            self.long.add(counter)


@dataclass(frozen=True)
class Counters:
    """The counters of all prefixes. Not complete: the time limit was reached."""

    prefixes: tuple[CountedCalls, ...]
    is_complete: bool
    seconds: float


@probe
def read_counters(
    block: Redis, limits: Mapping[str, Sequence[int]], near_ratio: float, budget_seconds: float
) -> Counters:
    """The counters under each prefix of `limits` (→ requests, and seconds of their window), in all databases. A key
    belongs to its longest prefix.

    Raises:
        Unreachable, OpsError: the server does not answer, or refuses.
    """
    started, found, is_complete = time.monotonic(), list[CountedCalls](), True
    prefixes = {read_prefix(text): text for text in limits}
    with connected(block) as client:
        for prefix, text in prefixes.items():
            most, window = limits[text]
            counted = CountedCalls(text, most, window)
            found.append(counted)
            longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
            for database, keys in matching(client, under(prefix)):
                for counter in _read(client, database, [key for key in keys if not key.startswith(longer)]):
                    counted.add(counter, near_ratio)
                if time.monotonic() > started + budget_seconds:
                    is_complete = False
                    break
    return Counters(tuple(found), is_complete, time.monotonic() - started)


def _read(client: redis.Redis, database: int, keys: Sequence[bytes]) -> Iterator[Counter]:
    """The counters that still exist."""
    if not keys:
        return
    with client.pipeline(transaction=False) as pipe:
        call(pipe, "SELECT", database)
        for key in keys:
            call(pipe, "GET", key)
            call(pipe, "PTTL", key)
        answers: list[Any] = pipe.execute(raise_on_error=False)[1:]
    for key, value, ttl in zip(keys, answers[::2], answers[1::2], strict=True):
        if isinstance(ttl, redis.RedisError):
            raise ttl
        if ttl != -2:
            yield Counter(database, shown(key), _number(value), ttl / 1000 if ttl >= 0 else -1)


def _number(value: object) -> int | None:
    """None: the value has another type, or is no integer."""
    if isinstance(value, redis.exceptions.NoPermissionError):
        raise value
    try:
        return int(value) if isinstance(value, bytes) else None
    except ValueError:
        return None
