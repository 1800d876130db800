"""One pass over the keys of a server, page by page: bounded, paced, added up by prefix."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.progress import Done
from runbook.wait import until
from tasks.redis.cache.pages import Ask, Group, Page, read_page
from tasks.redis.server import at_once, call

# A page of the server's time, a few times what a GET takes: other clients wait so long at most.
PAGE_SECONDS, PLAIN_SECONDS = 0.0002, 0.002
STEP_KEYS, MOST_STEP, LEAST_STEP = 128, 512, 4
FIRST_KEYS = 20
MOST_PREFIXES = 10_000
OTHERS = b"(other prefixes)"
PAGES_PER_SECOND = 20  # of a pass that is slowed down


@dataclass(frozen=True)
class PrefixCount:
    """Keys of one prefix in one database; bytes and TTL of `measured` of them are known."""

    database: int
    prefix: bytes
    keys: int
    measured: int
    measured_bytes: int
    measured_untimed: int

    @property
    def bytes(self) -> int:
        """By the measured ones."""
        return round(self.measured_bytes * self.keys / self.measured) if self.measured else 0

    @property
    def without_ttl(self) -> int:
        """By the measured ones."""
        return round(self.measured_untimed * self.keys / self.measured) if self.measured else 0


@dataclass(frozen=True)
class FirstKey:
    """One key by name. `ttl_ms`: -1 without one, -2 where it is gone or the ACL hides it; `bytes` -1 likewise."""

    database: int
    key: bytes
    kind: str
    ttl_ms: int
    bytes: int


@dataclass(frozen=True)
class Sweep:
    """What one pass found, or unlinked. `with_ttl` and `protected` (prefix, count) were left out; `stopped` is why it
    did not come to its end, and `lost` that an answer did not come: a page more may be unlinked than is counted.
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
        """Of all prefixes."""
        return sum(count.keys for count in self.counts)

    @property
    def bytes(self) -> int:
        """Of all prefixes, by the measured keys."""
        return sum(count.bytes for count in self.counts)

    @property
    def sampled(self) -> bool:
        """Whether bytes are an estimate."""
        return any(count.measured < count.keys for count in self.counts)


@dataclass
class Tally:
    """Pages, added up. `total`: keys there are to look at, about."""

    total: int
    visited: int = 0
    keys: int = 0
    with_ttl: int = 0
    seen: int = 0
    longest: float = 0.0
    measurable: bool = True
    groups: dict[tuple[int, bytes], Group] = field(default_factory=dict)
    protected: Counter[bytes] = field(default_factory=Counter)
    names: list[tuple[int, bytes]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, number: int, page: Page, step: int) -> None:
        """One more page of a database."""
        self.visited += step
        self.with_ttl += page.timed
        self.seen = page.seen
        self.longest = max(self.longest, page.seconds)
        self.measurable = self.measurable and page.measurable
        self.protected.update(page.protected)
        self.names += [(number, name) for name in page.names]
        for name, found in page.groups.items():
            key = (number, name if len(self.groups) < MOST_PREFIXES or (number, name) in self.groups else OTHERS)
            self.groups.setdefault(key, Group()).add(found)
            self.keys += found.keys

    def told(self, what: str) -> Done:
        """How far it is: SCAN visits about as many keys as it is told to."""
        return Done(f"{self.keys:,} keys {what} (of {self.total:,} to look at)", self.visited / max(self.total, 1))

    def result(self, first: tuple[FirstKey, ...] = (), stopped: OpsError | None = None, *, lost: bool = False) -> Sweep:
        """Most keys first."""
        counts = [
            PrefixCount(number, name, group.keys, group.measured, group.bytes, group.untimed)
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


class Pace:
    """So many keys a second at most; 0: as many as the server unlinks."""

    def __init__(self, keys_per_second: int) -> None:
        self._rate, self._began = keys_per_second, time.monotonic()
        self.most_step = math.ceil(keys_per_second / PAGES_PER_SECOND) if keys_per_second else MOST_STEP

    def keep(self, keys: int) -> None:
        """Return when that many are due."""
        if not self._rate:
            return
        due = self._began + keys / self._rate
        left = due - time.monotonic()
        if left > 0:
            until(lambda: time.monotonic() >= due, what="the next page", seconds=left + 60, every_seconds=left)


@contextlib.contextmanager
def client_of(block: Redis, database: int) -> Iterator[redis.Redis]:
    """A client of one database, which it selects again whenever it connects again. Inside `connected(...)`."""
    with contextlib.closing(at_once(block.client(database))) as pooled, cast(Any, pooled).client() as client:
        yield client  # of one connection: no pool to ask for it with every page


def sweep(
    block: Redis,
    database: int,
    ask: Ask,
    tally: Tally,
    *,
    most_step: int = MOST_STEP,
    names: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Generator[None, None, None]:
    """All pages of one database, one at a time; `between` is called before each. How long one took sizes the next.

    Inside `connected(...)`, which says what an error means.
    """
    cursor, step, aim = b"0", min(STEP_KEYS, most_step), PAGE_SECONDS if ask.scripts else PLAIN_SECONDS
    with client_of(block, database) as client:
        while True:
            between()
            page = read_page(client, ask, cursor, step, tally.seen, max(names - len(tally.names), 0))
            tally.add(database, page, step)
            if page.error:
                raise page.error
            failpoint("cache: unlinked a page" if ask.unlink else "cache: counted a page")
            cursor = page.cursor
            if cursor == b"0":
                return
            wanted = round(step * aim / max(page.seconds, aim / 2))  # at most twice this one
            step = min(max(wanted, step // 4, LEAST_STEP), MOST_STEP, most_step)
            yield


def describe(block: Redis, names: list[tuple[int, bytes]]) -> tuple[FirstKey, ...]:
    """Type, TTL and bytes of some keys, as far as they are there and the ACL shows them. Inside `connected(...)`."""
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


def _number(answer: Any, otherwise: int) -> int:
    return answer if isinstance(answer, int) else otherwise
