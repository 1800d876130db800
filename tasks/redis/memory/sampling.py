"""What the pages of all databases told, in bounded memory: the biggest prefixes, the biggest and the hottest keys."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tasks.redis.memory.estimates import LEAST_PAGES, DatabaseSum, PrefixSum, Stratum, Sums, database_sum, prefix_sum
from tasks.redis.memory.script import BYTES, KEYS, TYPES, WIDTH, KeyFacts, Page, Request, first_level, prefix_of

T = TypeVar("T", bound=tuple[Any, ...])
MOST_PREFIXES = 1000
MOST_KEYS = 20
# A prefix that holds more than half of the bytes is parted at its second colon, once so many keys were read.
DOMINANT_SHARE = 0.5
KEYS_BEFORE_PARTING = 1000
LEAST_KEYS_PER_PART = 2.0


@dataclass(frozen=True)
class Part:
    """A dominant prefix's second level, of the keys that were read after it was seen to be dominant."""

    prefix: bytes
    keys: int
    size: int


@dataclass(frozen=True)
class BigName:
    """A candidate of the biggest keys. `type` is a place in TYPES."""

    database: int
    key: bytes
    type: int
    size: int


class Bounded:
    """Sums by name, of the biggest names only: when there are twice as many as are kept, the smaller half is let go."""

    def __init__(self, most: int = MOST_PREFIXES) -> None:
        self.most = most
        self.kept: dict[tuple[int, bytes], Sums] = {}
        self.dropped = 0

    def add(self, name: tuple[int, bytes], numbers: list[int], page_keys: int) -> None:
        """See Sums.add. A name that was let go begins anew: its former part stays with the others."""
        sums = self.kept.get(name)
        if sums is None:
            if len(self.kept) >= 2 * self.most:
                self._prune()
            sums = self.kept[name] = Sums()
        sums.add(numbers, page_keys)

    def _prune(self) -> None:
        biggest = heapq.nlargest(self.most, self.kept.items(), key=lambda item: item[1].size)
        self.dropped += len(self.kept) - len(biggest)
        self.kept = dict(biggest)


class Biggest:
    """The biggest keys of each type."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self.most = most
        self._heaps: list[list[tuple[int, int, bytes]]] = [[] for _ in TYPES]

    @property
    def floors(self) -> tuple[int, ...]:
        """By type: a key must be bigger to be among them."""
        return tuple(heap[0][0] if len(heap) >= self.most else -1 for heap in self._heaps)

    def add(self, database: int, keys: Iterable[KeyFacts]) -> None:
        """A page's candidates. A table that is resized may give a key twice."""
        for facts in keys:
            _keep(self._heaps[facts.type], (facts.size, database, facts.key), self.most)

    def ranked(self) -> list[BigName]:
        """The biggest first; one that grew between two readings is there once."""
        found: dict[tuple[int, bytes], BigName] = {}
        for place, heap in enumerate(self._heaps):
            for size, database, key in heap:
                known = found.get((database, key))
                if known is None or known.size < size:
                    found[database, key] = BigName(database, key, place, size)
        return sorted(found.values(), key=lambda name: -name.size)


class Tally:
    """Everything that the pages of all databases told, in bounded memory."""

    def __init__(self, expected: dict[int, int], *, count_hits: bool = False, most: int = MOST_PREFIXES) -> None:
        self.strata = {number: Stratum(number, keys) for number, keys in expected.items()}
        self.prefixes, self.parts = Bounded(most), Bounded(most)
        self.biggest = Biggest()
        self.hot: list[tuple[int, int, bytes]] = []
        self.parted, self._choose_at, self._hopeless = b"", KEYS_BEFORE_PARTING, {b""}
        self._common, self._floors, self._hottest = "-", self.biggest.floors, 0 if count_hits else -1

    def request(self, stratum: Stratum, count: int) -> Request:
        """The next page of a database."""
        return Request(stratum.database, stratum.cursor, count, self.parted, self._common, self._floors, self._hottest)

    @property
    def is_thin(self) -> bool:
        """Whether of some database so few pages were read that they give no error."""
        return any(s.pages < LEAST_PAGES and not s.is_complete for s in self.strata.values())

    def next(self) -> Stratum | None:
        """The database of which the smallest part was read, so that all are sampled alike; None when all are read."""
        left = [stratum for stratum in self.strata.values() if not stratum.is_complete]
        return min(left, key=lambda stratum: stratum.part, default=None)

    def add(self, request: Request, page: Page) -> None:
        """One page. (Its stratum's `turn` is called before, as the next page is asked for in between.)"""
        database = request.database
        whole: dict[bytes, list[int]] = {}
        for name, numbers in page.groups():
            first = first_level(name)
            if first == request.parted == self.parted and first:
                self.parts.add((database, name), numbers, page.read)
            known = whole.get(first)
            whole[first] = [a + b for a, b in zip(known, numbers, strict=True)] if known else numbers
        everything = [0] * WIDTH
        for prefix, numbers in whole.items():
            self.prefixes.add((database, prefix), numbers, page.read)
            everything = [a + b for a, b in zip(everything, numbers, strict=True)]
        self.strata[database].total.add(everything, page.read)
        self.biggest.add(database, page.biggest)
        for hits, key in page.hot:
            _keep(self.hot, (hits, database, key), MOST_KEYS)
        self._prepare_requests()
        self._choose_parted()

    def _prepare_requests(self) -> None:
        """What the next request tells: the type that most keys have, and what a key must have more of to be told."""
        if any(self.strata[number].pages % 16 == 1 for number in self.strata):
            counts = Counter[str]()
            for stratum in self.strata.values():
                counts.update(dict(zip(TYPES, stratum.total.numbers[KEYS], strict=True)))
            self._common = counts.most_common(1)[0][0]
        self._floors = self.biggest.floors
        if self._hottest >= 0 and len(self.hot) >= MOST_KEYS:
            self._hottest = self.hot[0][0]

    def _choose_parted(self) -> None:
        """Whether one prefix dominates: asked again whenever twice as many keys were read. Given up where nearly each
        of its keys has a second level of its own."""
        parts = self.parts.kept.values()
        if len(parts) >= self.parts.most and sum(sums.keys for sums in parts) < LEAST_KEYS_PER_PART * len(parts):
            self._hopeless.add(self.parted)
            self._part(b"")
        read = sum(stratum.read for stratum in self.strata.values())
        if read < self._choose_at:
            return
        self._choose_at = 2 * read
        sizes = Counter[bytes]()
        for (_, prefix), sums in self.prefixes.kept.items():
            sizes[prefix] += sums.size
        (first, size), *_ = sizes.most_common(1)
        if size > DOMINANT_SHARE * sum(sizes.values()) and first not in self._hopeless:
            self._part(first)

    def _part(self, prefix: bytes) -> None:
        if prefix != self.parted:
            self.parted, self.parts = prefix, Bounded(self.parts.most)

    def correct(self, name: BigName, size: int, *, persistent: bool) -> None:
        """A key that a page counted by a guess has so many bytes: its database's and its prefix's sums change."""
        stratum, key = self.strata[name.database], (name.database, prefix_of(name.key))
        sums = [stratum.total, self.prefixes.kept.get(key)]
        if (part := self.parts.kept.get((name.database, prefix_of(name.key, self.parted)))) and part.size >= name.size:
            sums.append(part)
        for one in sums:
            if one is not None:
                one.correct(name.type, name.size, size, stratum.read / max(stratum.pages, 1), persistent=persistent)
        if sums[1] is None and size > name.size:  # it was let go as small
            numbers = [0] * WIDTH
            numbers[name.type], numbers[BYTES.start + name.type] = 1, size
            self.prefixes.add(key, numbers, stratum.read // max(stratum.pages, 1))

    def databases(self) -> list[DatabaseSum]:
        """By number."""
        return [database_sum(self.strata[number]) for number in sorted(self.strata)]

    def ranked_prefixes(self) -> list[PrefixSum]:
        """The biggest first."""
        found = [prefix_sum(self.strata[number], name, sums) for (number, name), sums in self.prefixes.kept.items()]
        return sorted(found, key=lambda item: -item.size.value)

    def ranked_parts(self) -> list[Part]:
        """The parted prefix's second level over all databases, the biggest first."""
        found: dict[bytes, tuple[int, int]] = {}
        for (_, name), sums in self.parts.kept.items():
            keys, size = found.get(name, (0, 0))
            found[name] = keys + sums.keys, size + sums.size
        return sorted((Part(name, *counts) for name, counts in found.items()), key=lambda part: -part.size)


def _keep(heap: list[T], item: T, most: int) -> None:
    if item in heap:
        return
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif item > heap[0]:
        heapq.heapreplace(heap, item)
