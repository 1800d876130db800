"""An estimate of a recovery's duration from past ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

ALIKE = 1.2
"""With sizes closer together, the cost of one more byte is unknown."""
MOST_SAMPLES = 20


@dataclass(frozen=True)
class DurationSample:
    """A measured recovery."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class DurationEstimate:
    """Seconds, from a number of samples with sizes from `smallest` to `biggest`."""

    seconds: float
    samples: int
    smallest: int
    biggest: int


def estimate(samples: Sequence[DurationSample], bytes_: int) -> DurationEstimate | None:
    """The seconds for a number of bytes: a fixed part and a part per byte, by the Theil–Sen estimator, which a
    disturbed sample does not change. `samples`: oldest first; the last ones count. None: there are none.

    With samples of one size only, the time is proportional to the bytes, but not shorter for fewer: the fixed part is
    unknown.
    """
    known = [one for one in samples if one.seconds > 0][-MOST_SAMPLES:]
    if not known:
        return None
    sizes = [one.bytes for one in known]
    return DurationEstimate(max(_line(known, bytes_), 0.0), len(known), min(sizes), max(sizes))


def _line(known: Sequence[DurationSample], bytes_: int) -> float:
    pairs = [
        (one, two) if one.bytes < two.bytes else (two, one)
        for one, two in combinations(known, 2)
        if max(one.bytes, two.bytes) > ALIKE * min(one.bytes, two.bytes)
    ]
    if not pairs:
        usual = median(one.seconds for one in known)
        size = median(one.bytes for one in known)
        return usual * max(bytes_ / size, 1.0) if size and bytes_ else usual
    per_byte = max(median((two.seconds - one.seconds) / (two.bytes - one.bytes) for one, two in pairs), 0.0)
    fixed = median(one.seconds - per_byte * one.bytes for one in known)
    if fixed < 0:
        return median(one.seconds / one.bytes for one in known if one.bytes) * bytes_
    return fixed + per_byte * bytes_
