"""How an environment grew: bytes by month, from the reports of the chain, and what is there now."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from runbook.kinds import probe
from tasks.reports.past import FiledReport, filed

BACKUP = " backup"
DAYS = 30.44
"""Of a month, on average."""


@dataclass(frozen=True)
class CapacitySample:
    """So many bytes at a moment."""

    at: datetime
    bytes: int


@dataclass(frozen=True)
class Growth:
    """Of one resource; `samples` in their order."""

    of: str
    samples: tuple[CapacitySample, ...]

    @property
    def months(self) -> float:
        """Between the first and the last sample."""
        return (self.samples[-1].at - self.samples[0].at).total_seconds() / 86400 / DAYS

    @property
    def known(self) -> bool:
        """Whether a month lies between the two: less tells nothing of a year."""
        return len(self.samples) > 1 and self.months >= 1

    @property
    def monthly_bytes(self) -> float:
        """How much a month adds, on average."""
        return (self.samples[-1].bytes - self.samples[0].bytes) / self.months

    def by_month(self) -> dict[str, int]:
        """The last sample of each month."""
        return {f"{one.at:%Y-%m}": one.bytes for one in self.samples}


@probe
def read_growth(reports: Path, environment: str, since: datetime) -> tuple[Growth, ...]:
    """Of everything that a report measured the backup of: `database`, `redis`, `files`.

    Raises:
        OpsError: the reports cannot be read.
    """
    found = dict[str, list[CapacitySample]]()
    for one in filed(reports, environment, since=since):
        for of, size in _sizes(one):
            found.setdefault(of, []).append(CapacitySample(one.started, size))
    return tuple(Growth(of, tuple(sorted(all_, key=lambda one: one.at))) for of, all_ in sorted(found.items()))


def _sizes(one: FiledReport) -> Iterable[tuple[str, int]]:
    for measure in one.content.get("measures") or []:
        what, size = str(measure.get("what", "")), measure.get("bytes")
        if what.endswith(BACKUP) and isinstance(size, int) and size > 0:
            yield what.removesuffix(BACKUP), size
