"""Which keys use a server's memory (§2.1): a sweep in pages too small to delay other clients.

The biggest keys are not measured with SAMPLES 0, which reads every element while other clients wait. A key of five
million elements (hash, set or sorted set, 200 to 380 MB) blocked Valkey 9.1.2 for 1.5 to 3.8 s (two busy processors).
SAMPLES 50000 took 1 to 35 ms on the same keys; its sizes were within 0.1 %. So sizes are exact up to 50,000 elements,
and the report marks larger keys with "about".
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from runbook.progress import WorkDone, progress
from tasks.redis.background import in_background
from tasks.redis.memory.estimates import DatabaseSum, PrefixSum
from tasks.redis.memory.sampling import MOST_KEYS, BigName, SurveyTally
from tasks.redis.memory.script import TYPES, read_page, require_commands
from tasks.redis.script import PageSize
from tasks.redis.server import call, connected, key_counts

# The server's time for a page: other clients wait at most that long.
PAGE_SECONDS = 0.0003
LEAST_PAGE_KEYS, MOST_PAGE_KEYS = 10, 1000
KEYS_PER_TYPE = 3
# A page's MEMORY USAGE reads 5 elements of a collection: a few large ones among many small ones can be missed. So the
# candidates of the biggest keys are measured again, exactly up to this many elements (see above).
MEASURED_ELEMENTS = 50_000
LENGTHS = {"list": "LLEN", "set": "SCARD", "zset": "ZCARD", "hash": "HLEN", "stream": "XLEN"}


@dataclass(frozen=True)
class BigKey:
    """One of the biggest keys. `elements` -1: a string, a module's type, or not counted. `is_exact`: every element was
    measured."""

    database: int
    key: bytes
    type: str
    size: int
    elements: int
    ttl_ms: int
    is_exact: bool = True


@dataclass(frozen=True)
class Survey:
    """The result of a sweep. `longest_worked_seconds`: the server's processor time for the longest page.
    `why_uncounted`: why the elements of the biggest keys were not counted."""

    databases: tuple[DatabaseSum, ...]
    prefixes: tuple[PrefixSum, ...]
    dropped_prefixes: int
    biggest: tuple[BigKey, ...]
    biggest_by_type: tuple[BigKey, ...]
    pages: int
    seconds: float
    longest_worked_seconds: float
    why_uncounted: str

    @property
    def is_complete(self) -> bool:
        """Whether every database was read to its end."""
        return all(found.is_complete for found in self.databases)

    @property
    def read(self) -> int:
        """The keys that were read."""
        return sum(found.read for found in self.databases)

    @property
    def expected(self) -> int:
        """The keys by INFO when the sweep began."""
        return sum(found.expected for found in self.databases)


@probe
def survey_keys(block: Redis, budget_seconds: float) -> Survey:
    """Size, type and TTL of every key of every database, or of a sample if the time limit is reached.

    Raises:
        Unreachable: the server is down, or went down.
        OpsError: the user may not run a command, which is named.
    """
    with connected(block) as client:
        require_commands(client)
        started = time.monotonic()
        tally = SurveyTally({number: keys for number, (keys, _) in key_counts(client).items()})
        with progress(lambda: _progress(tally)):
            longest = in_background(_sweep(client, tally, budget_seconds))
        seconds = time.monotonic() - started
        why_uncounted = _why_uncounted(client)
        biggest = _measure_biggest(client, tally, count=not why_uncounted)
        of_types = [key for kind in TYPES for key in [one for one in biggest if one.type == kind][:KEYS_PER_TYPE]]
        return Survey(
            databases=tuple(tally.databases()),
            prefixes=tuple(tally.ranked_prefixes()),
            dropped_prefixes=tally.prefixes.dropped,
            biggest=tuple(biggest[:MOST_KEYS]),
            biggest_by_type=tuple(of_types),
            pages=sum(stratum.pages for stratum in tally.strata.values()),
            seconds=seconds,
            longest_worked_seconds=longest,
            why_uncounted=why_uncounted,
        )


def _sweep(client: redis.Redis, tally: SurveyTally, budget_seconds: float) -> Generator[None, None, float]:
    """Page after page until all keys are read or the time limit is reached. Returns the longest page's seconds."""
    size = PageSize(PAGE_SECONDS, least=LEAST_PAGE_KEYS, most=MOST_PAGE_KEYS)
    end, longest = time.monotonic() + budget_seconds, 0.0
    while (stratum := tally.next()) and (time.monotonic() < end or tally.is_thin):
        page = read_page(client, stratum.database, stratum.cursor, size.keys, tally.biggest.floors)
        size.adapt(page.worked_seconds)
        longest = max(longest, page.worked_seconds)
        tally.add(stratum, page)
        yield
    return longest


def _progress(tally: SurveyTally) -> WorkDone:
    read = sum(stratum.read for stratum in tally.strata.values())
    expected = sum(stratum.expected for stratum in tally.strata.values())
    return WorkDone(f"{read:,} of {expected:,} keys read", read / max(expected, 1))


def _measure_biggest(client: redis.Redis, tally: SurveyTally, *, count: bool) -> list[BigKey]:
    """Measure every candidate of the biggest keys and correct the sums. The biggest first."""
    found = list[BigKey]()
    for name in tally.biggest.ranked():
        if key := _measure(client, name, count):
            tally.correct(name, key.size, persistent=key.ttl_ms < 0)
            found.append(key)
    return sorted(found, key=lambda key: -key.size)


def _why_uncounted(client: redis.Redis) -> str:
    """Why elements cannot be counted without changing the keys' idle times; "": they can."""
    try:
        call(client, "CLIENT", "NO-TOUCH", "OFF")
    except redis.ResponseError as error:  # forbidden, or a server before 7.2
        return str(error)
    return ""


def _measure(client: redis.Redis, name: BigName, count: bool) -> BigKey | None:
    """None: the key is missing by now."""
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
    most = elements if elements >= 0 else size  # an element has at least one byte
    is_exact = kind not in LENGTHS or most <= MEASURED_ELEMENTS
    return BigKey(name.database, name.key, kind, size, elements, ttl, is_exact)
