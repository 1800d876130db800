"""An estimate of a recovery's duration from past ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median

ALIKE = 1.2
"""With sizes closer together, the cost of one more byte is unknown."""
MOST_SAMPLES = 20
FEW = 3
ON_PRIVATE_SERVER = ", on a private server"
"""In the name of a measure."""
LIVE_RATIO = 1.2
"""restore-database against verify-backup on a private server, 1 GB, two cores: docs/benchmarks-recovery.md."""


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


def from_private(samples: Sequence[DurationSample]) -> list[DurationSample]:
    """What verifications on a private server, without a standby, an archive or durability, say about a restore on the
    live one."""
    return [replace(one, seconds=one.seconds * LIVE_RATIO) for one in samples]


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
    return DurationEstimate(max(_line(_usual(known), bytes_), 0.0), len(known), min(sizes), max(sizes))


def _usual(known: Sequence[DurationSample]) -> list[DurationSample]:
    """One sample for each size. Of two or three for about the same size the shortest counts: disturbances take time,
    and a first run finds cold caches."""
    groups = list[list[DurationSample]]()
    for one in sorted(known, key=lambda sample: sample.bytes):
        if groups and one.bytes <= ALIKE * groups[-1][0].bytes:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [
        DurationSample(int(median(one.bytes for one in group)), _middle([one.seconds for one in group]))
        for group in groups
    ]


def _middle(seconds: Sequence[float]) -> float:
    return min(seconds) if len(seconds) <= FEW else median(seconds)


def _line(known: Sequence[DurationSample], bytes_: int) -> float:
    """The straight line through the samples of different sizes."""
    if len(known) == 1:
        (one,) = known
        return one.seconds * max(bytes_ / one.bytes, 1.0) if one.bytes and bytes_ else one.seconds
    per_byte = median((two.seconds - one.seconds) / (two.bytes - one.bytes) for one, two in combinations(known, 2))
    per_byte = max(per_byte, 0.0)
    fixed = median(one.seconds - per_byte * one.bytes for one in known)
    if fixed < 0:
        return median(one.seconds / one.bytes for one in known if one.bytes) * bytes_
    return fixed + per_byte * bytes_
