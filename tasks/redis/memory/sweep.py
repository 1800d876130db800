"""What a server's memory holds (§2.1): a sweep over all keys that disturbs nobody (https://valkey.io/commands/scan/).

The biggest keys are not measured with SAMPLES 0, which looks at every element while the server answers nobody else. A
key of five million elements (hash, set or sorted set, 200 to 380 MB) blocked Valkey 9.1.2 for 1.5 to 3.8 s, and another
client's PING for as long (two busy processors). SAMPLES 50000 took 1 to 35 ms on the same keys, and gave sizes within
0.1 %. So up to 50,000 elements a size is exact; beyond, a report says "about".
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from runbook.progress import Done, progress
from tasks.redis.background import in_background
from tasks.redis.memory.estimates import DatabaseSum, PrefixSum
from tasks.redis.memory.pace import Pace, measure_idle
from tasks.redis.memory.reader import Reader, reader_for
from tasks.redis.memory.sampling import MOST_KEYS, BigName, Part, Tally
from tasks.redis.memory.script import TYPES, Request
from tasks.redis.server import call, connected, key_counts

TYPES_TOLD = 3
# The sweep's MEMORY USAGE looks at the first 5 elements of a collection only: one of a few huge ones among many small
# is taken for small. The candidates of the biggest keys are measured again, exactly up to so many elements: the
# module's docstring says why not all.
MEASURED_ELEMENTS = 50_000
SLOW_CALLS_READ = 32
CLIENT_NAME = b"interview-ops"
LENGTHS = {"list": "LLEN", "set": "SCARD", "zset": "ZCARD", "hash": "HLEN", "stream": "XLEN"}


@dataclass(frozen=True)
class BigKey:
    """One of the biggest keys. `elements` -1: a string, a module's type, or it may not be counted. `is_exact`: each of
    its elements was measured."""

    database: int
    key: bytes
    type: str
    size: int
    elements: int
    ttl_ms: int
    is_exact: bool = True


@dataclass(frozen=True)
class HotKey:
    """A key and its LFU counter (logarithmic, 0 to 255: https://valkey.io/topics/lru-cache/)."""

    database: int
    key: bytes
    hits: int


@dataclass(frozen=True)
class Survey:
    """What the sweep found. The longest page took so long there and back, and so much of the server's processor (0: not
    measured, by a pipeline). `why_slow` says why pages were read without the script ("" where by it), `why_uncounted`
    why elements of the biggest keys were not counted; `slow_calls` are this program's own in the slow log, -1 where
    that may not be read."""

    databases: tuple[DatabaseSum, ...]
    prefixes: tuple[PrefixSum, ...]
    dropped_prefixes: int
    parted: bytes
    parts: tuple[Part, ...]
    biggest: tuple[BigKey, ...]
    biggest_by_type: tuple[BigKey, ...]
    hot: tuple[HotKey, ...]
    pages: int
    seconds: float
    longest_seconds: float
    longest_worked_seconds: float
    why_slow: str
    why_uncounted: str
    slow_calls: int

    @property
    def is_complete(self) -> bool:
        """Whether every database was read to its end."""
        return all(found.is_complete for found in self.databases)

    @property
    def read(self) -> int:
        """Keys that were read."""
        return sum(found.read for found in self.databases)

    @property
    def expected(self) -> int:
        """Keys that INFO counted when the sweep began."""
        return sum(found.expected for found in self.databases)


@probe
def survey_keys(block: Redis, budget_seconds: float, count_hits: bool = False) -> Survey:
    """Size, type and TTL of every key of every database; of a sample of them when the time is over.

    Raises:
        Unreachable: the server is down, or went down.
        OpsError: the user may not run a command that this needs; it says which.
    """
    with connected(block) as client:
        started, last_slow = time.monotonic(), _last_slow(client)
        tally = Tally({number: keys for number, (keys, _) in key_counts(client).items()}, count_hits=count_hits)
        with progress(lambda: _told(tally)):
            pace, why_slow = in_background(_sweep(client, tally, budget_seconds))
        seconds = time.monotonic() - started
        why_uncounted = _why_uncounted(client)
        looked = _look_again(client, tally, count=not why_uncounted)
        biggest, by_type = _biggest(looked)
        return Survey(
            databases=tuple(tally.databases()),
            prefixes=tuple(tally.ranked_prefixes()),
            dropped_prefixes=tally.prefixes.dropped,
            parted=tally.parted,
            parts=tuple(tally.ranked_parts()),
            biggest=biggest,
            biggest_by_type=by_type,
            hot=tuple(HotKey(number, key, hits) for hits, number, key in sorted(tally.hot, reverse=True)),
            pages=sum(stratum.pages for stratum in tally.strata.values()),
            seconds=seconds,
            longest_seconds=pace.longest_seconds,
            longest_worked_seconds=pace.longest_worked_seconds,
            why_slow=why_slow,
            why_uncounted=why_uncounted,
            slow_calls=_slow_calls(client, last_slow),
        )


def _sweep(client: redis.Redis, tally: Tally, budget_seconds: float) -> Generator[None, None, tuple[Pace, str]]:
    """Page after page until all is read or the time is over. While the server works on one, the last is added up."""
    reader, why_slow = reader_for(client)
    pace = Pace(*measure_idle(client))
    end = time.monotonic() + budget_seconds
    try:
        request = _ask(reader, tally, pace)
        while request:
            page, answered = reader.page(), request
            tally.strata[answered.database].turn(page)
            pace.took(reader.seconds, page.worked_seconds)
            pace.rest()
            request = _ask(reader, tally, pace) if time.monotonic() < end or tally.is_thin else None
            tally.add(answered, page)
            yield
    finally:
        reader.close()
    return pace, why_slow


def _ask(reader: Reader, tally: Tally, pace: Pace) -> Request | None:
    """Ask for the next page, of the database of which the smallest part was read; None when all are read."""
    stratum = tally.next()
    if not stratum:
        return None
    request = tally.request(stratum, pace.count)
    reader.ask(request)
    return request


def _told(tally: Tally) -> Done:
    read = sum(stratum.read for stratum in tally.strata.values())
    expected = sum(stratum.expected for stratum in tally.strata.values())
    return Done(f"{read:,} of {expected:,} keys read", read / max(expected, 1))


def _look_again(client: redis.Redis, tally: Tally, *, count: bool) -> list[BigKey]:
    """Every candidate of the biggest keys, measured; the sums of its database and prefix are corrected by that. The
    biggest first."""
    found = list[BigKey]()
    for name in tally.biggest.ranked():
        if key := _look(client, name, count):
            tally.correct(name, key.size, persistent=key.ttl_ms < 0)
            found.append(key)
    return sorted(found, key=lambda key: -key.size)


def _biggest(looked: list[BigKey]) -> tuple[tuple[BigKey, ...], tuple[BigKey, ...]]:
    """The biggest of all, and the biggest of each type."""
    by_type = [key for kind in TYPES for key in [one for one in looked if one.type == kind][:TYPES_TOLD]]
    return tuple(looked[:MOST_KEYS]), tuple(sorted(by_type, key=lambda key: -key.size))


def _why_uncounted(client: redis.Redis) -> str:
    """Why elements cannot be counted without a trace in the keys' idle times, "" where they can."""
    try:
        call(client, "CLIENT", "NO-TOUCH", "OFF")
    except redis.ResponseError as error:  # forbidden, or a server before 7.2
        return str(error)
    return ""


def _look(client: redis.Redis, name: BigName, count: bool) -> BigKey | None:
    """None when it is gone by now."""
    kind = TYPES[name.type]
    length = LENGTHS.get(kind) if count else None
    with client.pipeline(transaction=False) as pipe:
        call(pipe, "SELECT", name.database)
        call(pipe, "MEMORY USAGE", name.key, "SAMPLES", MEASURED_ELEMENTS)
        call(pipe, "PTTL", name.key)
        if length:
            call(pipe, "CLIENT", "NO-TOUCH", "ON")
            call(pipe, length, name.key)
            call(pipe, "CLIENT", "NO-TOUCH", "OFF")
        _, size, ttl, *rest = pipe.execute(raise_on_error=False)
    if not isinstance(size, int) or not isinstance(ttl, int) or ttl == -2:
        return None
    elements = rest[1] if rest and isinstance(rest[1], int) else -1
    most = elements if elements >= 0 else size  # an element takes a byte at least
    is_exact = kind not in LENGTHS or most <= MEASURED_ELEMENTS
    return BigKey(name.database, name.key, kind, size, elements, ttl, is_exact)


def _last_slow(client: redis.Redis) -> int:
    """The number of the slow log's newest entry."""
    return max((entry["id"] for entry in _slow_log(client, 1)), default=-1)


def _slow_calls(client: redis.Redis, after: int) -> int:
    """This program's entries in the slow log after that one; -1 where it may not be read."""
    try:
        entries = _slow_log(client, SLOW_CALLS_READ, quietly=False)
    except redis.ResponseError:
        return -1
    return sum(entry["id"] > after and entry.get("client_name") == CLIENT_NAME for entry in entries)


def _slow_log(client: redis.Redis, most: int, *, quietly: bool = True) -> list[Any]:
    try:
        return list(client.slowlog_get(most))
    except redis.ResponseError:
        if quietly:
            return []
        raise
