"""The sum of all pages, in bounded memory: the biggest prefixes and the biggest keys."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from tasks.redis.memory.estimates import LEAST_PAGES, DatabaseSum, PrefixSum, Stratum, Sums, database_sum, prefix_sum
from tasks.redis.memory.script import BYTES, TYPES, WIDTH, KeyFacts, SurveyPage, prefix_of

MOST_PREFIXES = 1000
MOST_KEYS = 20


@dataclass(frozen=True)
class BigName:
    """A candidate of the biggest keys. `type` is an index of TYPES."""

    database: int
    key: bytes
    type: int
    size: int


class Prefixes:
    """Sums by database and prefix, of the biggest only: at twice as many as are kept, the smaller half is dropped."""

    def __init__(self, most: int = MOST_PREFIXES) -> None:
        self.most = most
        self.kept: dict[tuple[int, bytes], Sums] = {}
        self.dropped = 0

    def add(self, name: tuple[int, bytes], numbers: list[int], page_keys: int) -> None:
        """See Sums.add. A prefix that was dropped starts again from 0; its earlier part is counted with the others."""
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
        """By type: the size that a key must exceed to be one of them."""
        return tuple(heap[0][0] if len(heap) >= self.most else -1 for heap in self._heaps)

    def add(self, database: int, keys: Iterable[KeyFacts]) -> None:
        """A page's candidates. SCAN may return a key twice while a table is resized."""
        for facts in keys:
            heap, item = self._heaps[facts.type], (facts.size, database, facts.key)
            if item in heap:
                continue
            if len(heap) < self.most:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)

    def ranked(self) -> list[BigName]:
        """The biggest first. A key that grew between two pages is there once."""
        found: dict[tuple[int, bytes], BigName] = {}
        for place, heap in enumerate(self._heaps):
            for size, database, key in heap:
                known = found.get((database, key))
                if known is None or known.size < size:
                    found[database, key] = BigName(database, key, place, size)
        return sorted(found.values(), key=lambda name: -name.size)


class SurveyTally:
    """The pages of all databases. `expected`: database → keys by INFO."""

    def __init__(self, expected: dict[int, int], *, most: int = MOST_PREFIXES) -> None:
        self.strata = {number: Stratum(number, keys) for number, keys in expected.items()}
        self.prefixes, self.biggest = Prefixes(most), Biggest()

    @property
    def is_thin(self) -> bool:
        """Whether some database has too few pages for an error estimate."""
        return any(s.pages < LEAST_PAGES and not s.is_complete for s in self.strata.values())

    def next(self) -> Stratum | None:
        """The database of which the smallest share was read, so that all are sampled alike; None: all are read."""
        left = [stratum for stratum in self.strata.values() if not stratum.is_complete]
        return min(left, key=lambda stratum: stratum.part, default=None)

    def add(self, stratum: Stratum, page: SurveyPage) -> None:
        """Add a page of a database."""
        everything = [0] * WIDTH
        for prefix, numbers in page.groups.items():
            self.prefixes.add((stratum.database, prefix), numbers, page.read)
            everything = [a + b for a, b in zip(everything, numbers, strict=True)]
        stratum.add(page, everything)
        self.biggest.add(stratum.database, page.biggest)

    def correct(self, name: BigName, size: int, *, persistent: bool) -> None:
        """A key's size was measured: correct its database's and its prefix's sums, which a page had guessed."""
        stratum, key = self.strata[name.database], (name.database, prefix_of(name.key))
        page_keys = stratum.read / max(stratum.pages, 1)
        prefix = self.prefixes.kept.get(key)
        for sums in (stratum.total, *([prefix] if prefix else [])):
            sums.correct(name.type, name.size, size, page_keys, persistent=persistent)
        if prefix is None and size > name.size:  # it was dropped as small
            numbers = [0] * WIDTH
            numbers[name.type], numbers[BYTES.start + name.type] = 1, size
            self.prefixes.add(key, numbers, round(page_keys))

    def databases(self) -> list[DatabaseSum]:
        """By number."""
        return [database_sum(self.strata[number]) for number in sorted(self.strata)]

    def ranked_prefixes(self) -> list[PrefixSum]:
        """The biggest first."""
        found = [prefix_sum(self.strata[number], name, sums) for (number, name), sums in self.prefixes.kept.items()]
        return sorted(found, key=lambda item: -item.size.value)
