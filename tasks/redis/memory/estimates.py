"""Totals of all keys, extrapolated from the pages that were read.

SCAN walks a table by hash, so a page is a random cluster of the database's keys. Totals are ratio estimates per
database with the number of keys as cluster size (Cochran, Sampling Techniques, 9A.2). An error is half a 95 %
confidence interval; it is 0 if the database was read to its end. A big key outside the sample is in no interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tasks.redis.memory.script import BYTES, BYTES_WITHOUT_TTL, KEYS, TTLS, TYPES, WIDTH, WITHOUT_TTL, SurveyPage

Z_95 = 1.959964
LEAST_PAGES = 4


@dataclass(frozen=True)
class SizeEstimate:
    """A total and half of its 95 % confidence interval. 0: it was counted; NaN: unknown."""

    value: float
    error: float = 0.0

    def __add__(self, other: SizeEstimate) -> SizeEstimate:
        """Add another database's total, which was sampled independently."""
        return SizeEstimate(self.value + other.value, math.hypot(self.error, other.error))


ZERO = SizeEstimate(0.0)


class Sums:
    """One prefix's sums over pages: the script's WIDTH numbers, and the products that the error needs."""

    __slots__ = ("key_square", "key_times", "numbers", "size_square", "size_times")

    def __init__(self) -> None:
        self.numbers = [0] * WIDTH
        self.size_square = self.size_times = self.key_square = self.key_times = 0

    def add(self, numbers: list[int], page_keys: int) -> None:
        """Add a page's numbers of this prefix; the page had `page_keys` keys of all prefixes."""
        self.numbers = [old + new for old, new in zip(self.numbers, numbers, strict=True)]
        keys, size = sum(numbers[KEYS]), sum(numbers[BYTES])
        self.size_square += size * size
        self.size_times += size * page_keys
        self.key_square += keys * keys
        self.key_times += keys * page_keys

    def correct(self, kind: int, old: int, new: int, page_keys: float, *, persistent: bool) -> None:
        """A key of type `kind` has `new` bytes, not `old`. Its page had about `page_keys` keys; the page's other bytes
        are no longer known, so the error is slightly too small."""
        change = new - old
        self.numbers[BYTES.start + kind] += change
        if persistent:
            self.numbers[BYTES_WITHOUT_TTL] += change
        self.size_square += new * new - old * old
        self.size_times += round(change * page_keys)

    @property
    def keys(self) -> int:
        """Keys that were read."""
        return sum(self.numbers[KEYS])

    @property
    def size(self) -> int:
        """Bytes of the keys that were read."""
        return sum(self.numbers[BYTES])


class Stratum:
    """One database, and how far it was read. `expected`: its keys by INFO."""

    def __init__(self, database: int, expected: int) -> None:
        self.database, self.expected = database, expected
        self.cursor, self.is_complete = b"0", False
        self.read = self.missing = self.denied = self.pages = self.squares = 0
        self.total = Sums()

    @property
    def part(self) -> float:
        """The share that was read, 0 to 1."""
        return 1.0 if self.is_complete else min(self.read / max(self.expected, 1), 0.999)

    def add(self, page: SurveyPage, numbers: list[int]) -> None:
        """Add a page; `numbers`: the sums of all its prefixes."""
        self.cursor, self.is_complete = page.cursor, page.cursor == b"0"
        self.read += page.read
        self.missing += page.missing
        self.denied += page.denied
        self.pages += 1
        self.squares += page.read * page.read
        self.total.add(numbers, page.read)

    def scaled(self, number: float) -> float:
        """A sum over the pages, extrapolated to the whole database."""
        return number if self.is_complete or not self.read else number * max(self.expected, self.read) / self.read

    def size_of(self, sums: Sums) -> SizeEstimate:
        """A prefix's bytes in the whole database."""
        return self._estimate(sums.size, sums.size_square, sums.size_times)

    def keys_of(self, sums: Sums) -> SizeEstimate:
        """A prefix's keys in the whole database."""
        return self._estimate(sums.keys, sums.key_square, sums.key_times)

    def _estimate(self, total: int, square: int, times: int) -> SizeEstimate:
        if self.is_complete:
            return SizeEstimate(float(total))
        if self.pages < LEAST_PAGES or not self.read:
            return SizeEstimate(self.scaled(total), math.nan)
        ratio, keys = total / self.read, max(self.expected, self.read)
        residuals = max(square - 2 * ratio * times + ratio * ratio * self.squares, 0.0)
        variance = residuals * self.pages / (self.pages - 1) * (1 - self.read / keys)
        return SizeEstimate(ratio * keys, _student(self.pages - 1) * math.sqrt(variance) * keys / self.read)


@dataclass(frozen=True)
class PrefixSum:
    """One prefix of one database: estimated totals, and the types and TTLs of the `keys_read`."""

    database: int
    prefix: bytes
    keys: SizeEstimate
    size: SizeEstimate
    keys_read: int
    types: dict[str, int]
    ttls: tuple[int, ...]
    persistent_keys: float
    persistent_size: float


@dataclass(frozen=True)
class DatabaseSum:
    """One database: estimated totals."""

    database: int
    expected: int
    read: int
    is_complete: bool
    missing: int
    denied: int
    keys: SizeEstimate
    size: SizeEstimate
    persistent_keys: float
    sizes_by_type: dict[str, float]


def database_sum(stratum: Stratum) -> DatabaseSum:
    """A database's totals."""
    numbers = stratum.total.numbers
    return DatabaseSum(
        database=stratum.database,
        expected=stratum.expected,
        read=stratum.read,
        is_complete=stratum.is_complete,
        missing=stratum.missing,
        denied=stratum.denied,
        keys=stratum.keys_of(stratum.total),
        size=stratum.size_of(stratum.total),
        persistent_keys=stratum.scaled(numbers[WITHOUT_TTL]),
        sizes_by_type={name: stratum.scaled(size) for name, size in zip(TYPES, numbers[BYTES], strict=True) if size},
    )


def prefix_sum(stratum: Stratum, prefix: bytes, sums: Sums) -> PrefixSum:
    """A prefix's totals."""
    numbers = sums.numbers
    return PrefixSum(
        database=stratum.database,
        prefix=prefix,
        keys=stratum.keys_of(sums),
        size=stratum.size_of(sums),
        keys_read=sums.keys,
        types={name: keys for name, keys in zip(TYPES, numbers[KEYS], strict=True) if keys},
        ttls=tuple(numbers[TTLS]),
        persistent_keys=stratum.scaled(numbers[WITHOUT_TTL]),
        persistent_size=stratum.scaled(numbers[BYTES_WITHOUT_TTL]),
    )


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish-Fisher: 4 % low at 3 degrees, exact above 10)."""
    z = Z_95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
