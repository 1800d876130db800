"""One pass over a server's keys in small pages, summed by prefix."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.progress import WorkDone
from tasks.redis.cache.pages import PrefixGroup, SweepPage, SweepRequest, read_page
from tasks.redis.script import PageSize
from tasks.redis.server import at_once, call

# The server's time for a page, a few times a GET's: other clients wait at most that long.
PAGE_SECONDS = 0.0002
LEAST_STEP, MOST_STEP = 4, 512
FIRST_KEYS = 20
MOST_PREFIXES = 10_000
OTHERS = b"(other prefixes)"


@dataclass(frozen=True)
class PrefixCount:
    """Keys of one prefix in one database. Bytes and TTL are known for `measured` of them."""

    database: int
    prefix: bytes
    keys: int
    measured: int
    measured_bytes: int
    measured_without_ttl: int

    @property
    def bytes(self) -> int:
        """All keys' bytes, extrapolated from the measured ones."""
        return round(self.measured_bytes * self.keys / self.measured) if self.measured else 0

    @property
    def without_ttl(self) -> int:
        """The keys without a TTL, extrapolated from the measured ones."""
        return round(self.measured_without_ttl * self.keys / self.measured) if self.measured else 0


@dataclass(frozen=True)
class FirstKey:
    """One key. `ttl_ms` -1: none; -2: the key is missing, or the ACL hides it (then `bytes` is -1)."""

    database: int
    key: bytes
    kind: str
    ttl_ms: int
    bytes: int


@dataclass(frozen=True)
class Sweep:
    """What one pass counted or unlinked. `with_ttl` keys and `protected` ones (prefix, count) were left out. `stopped`:
    the error that ended it early; `lost`: it was a missing answer, so one more page may be unlinked than is counted.
    `measurable`: bytes and TTL could be read."""

    counts: tuple[PrefixCount, ...]
    protected: tuple[tuple[bytes, int], ...]
    with_ttl: int
    first: tuple[FirstKey, ...]
    seconds: float
    longest_seconds: float
    measurable: bool
    stopped: OpsError | None = None
    lost: bool = False

    @property
    def keys(self) -> int:
        """The keys of all prefixes."""
        return sum(count.keys for count in self.counts)

    @property
    def bytes(self) -> int:
        """The bytes of all prefixes, extrapolated from the measured keys."""
        return sum(count.bytes for count in self.counts)

    @property
    def sampled(self) -> bool:
        """Whether the bytes are an estimate."""
        return any(count.measured < count.keys for count in self.counts)


@dataclass
class SweepTally:
    """The sum of the pages. `total`: about how many keys SCAN will visit."""

    total: int
    visited: int = 0
    keys: int = 0
    with_ttl: int = 0
    seen: int = 0
    longest: float = 0.0
    measurable: bool = True
    groups: dict[tuple[int, bytes], PrefixGroup] = field(default_factory=dict)
    protected: Counter[bytes] = field(default_factory=Counter)
    names: list[tuple[int, bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, number: int, page: SweepPage, step: int) -> None:
        """Add a page of a database."""
        self.visited += step
        self.with_ttl += page.with_ttl
        self.seen = page.seen
        self.longest = max(self.longest, page.seconds)
        self.measurable = self.measurable and page.measurable
        self.protected.update(page.protected)
        self.names += [(number, name) for name in page.names]
        for name, found in page.groups.items():
            key = (number, name if len(self.groups) < MOST_PREFIXES or (number, name) in self.groups else OTHERS)
            self.groups.setdefault(key, PrefixGroup()).add(found)
            self.keys += found.keys

    def progress(self, verb: str) -> WorkDone:
        """For the log: SCAN visits about as many keys a page as its COUNT."""
        return WorkDone(f"{self.keys:,} keys {verb} (of {self.total:,} to check)", self.visited / max(self.total, 1))

    def result(self, first: tuple[FirstKey, ...] = (), stopped: OpsError | None = None, *, lost: bool = False) -> Sweep:
        """The result, the prefix with most keys first."""
        counts = [
            PrefixCount(number, name, group.keys, group.measured, group.bytes, group.without_ttl)
            for (number, name), group in self.groups.items()
            if group.keys
        ]
        return Sweep(
            counts=tuple(sorted(counts, key=lambda count: (-count.keys, count.database, count.prefix))),
            protected=tuple(self.protected.most_common()),
            with_ttl=self.with_ttl,
            first=first,
            seconds=time.monotonic() - self.began,
            longest_seconds=self.longest,
            measurable=self.measurable,
            stopped=stopped,
            lost=lost,
        )


@contextlib.contextmanager
def client_of(block: Redis, database: int) -> Iterator[redis.Redis]:
    """A client of one database, which it selects again after each reconnect. Use it inside `connected(...)`."""
    with contextlib.closing(at_once(block.client(database))) as pooled, cast(Any, pooled).client() as client:
        yield client  # with one connection: taking one from a pool for each page costs time


def sweep(
    block: Redis,
    database: int,
    request: SweepRequest,
    tally: SweepTally,
    *,
    names: int = 0,
    before_page: Callable[[], None] = lambda: None,
) -> Generator[None, None, None]:
    """All pages of one database, one at a time. Use it inside `connected(...)`, which translates errors."""
    cursor, size = b"0", PageSize(PAGE_SECONDS, least=LEAST_STEP, most=MOST_STEP)
    with client_of(block, database) as client:
        while True:
            before_page()
            page = read_page(client, request, cursor, size.keys, tally.seen, max(names - len(tally.names), 0))
            tally.add(database, page, size.keys)
            if page.error:
                raise page.error
            failpoint("cache: unlinked a page" if request.unlink else "cache: counted a page")
            cursor = page.cursor
            if cursor == b"0":
                return
            size.adapt(page.seconds)
            yield


def describe(block: Redis, names: list[tuple[int, bytes]]) -> tuple[FirstKey, ...]:
    """Type, TTL and bytes of some keys. Use it inside `connected(...)`."""
    found = []
    for number in sorted({number for number, _ in names}):
        with client_of(block, number) as client:
            for key in (name for where, name in names if where == number):
                with client.pipeline(transaction=False) as pipe:
                    for command in (("TYPE", key), ("PTTL", key), ("MEMORY", "USAGE", key)):
                        call(pipe, *command)
                    kind, left, size = pipe.execute(raise_on_error=False)
                found.append(FirstKey(number, key, _text(kind), _number(left, -2), _number(size, -1)))
    return tuple(found)


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else "?"


def _number(answer: Any, default: int) -> int:
    return answer if isinstance(answer, int) else default
