"""Advisories as every scanner tells them, and one row for what several of them tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tasks.dependencies.severity import Severity


@dataclass(frozen=True)
class Advisory:
    """A known vulnerability of a package that is there. `fixed` is empty where no version is known that fixes it."""

    ids: tuple[str, ...]
    package: str
    versions: tuple[str, ...]
    severity: Severity
    fixed: tuple[str, ...]
    summary: str
    places: tuple[str, ...]

    @property
    def name(self) -> str:
        """The id that people know it by: a CVE, else a GHSA, else what the scanner calls it."""
        return next((one for prefix in ("CVE-", "GHSA-") for one in self.ids if one.startswith(prefix)), self.ids[0])

    def is_called(self, wanted: str) -> bool:
        """Whether `wanted` is one of its ids."""
        return wanted.upper() in {one.upper() for one in self.ids}

    def same_as(self, other: Advisory) -> bool:
        """Whether both tell of one vulnerability of one package: they share an id."""
        same = {one.upper() for one in self.ids} & {one.upper() for one in other.ids}
        return bool(same) and canonical(self.package) == canonical(other.package)

    def joined(self, other: Advisory) -> Advisory:
        """One of both: the worse of their severities, every id, version, fix and place."""
        return replace(
            self,
            ids=_both(self.ids, other.ids),
            versions=_both(self.versions, other.versions),
            severity=max(self.severity, other.severity),
            fixed=_both(self.fixed, other.fixed),
            summary=self.summary or other.summary,
            places=_both(self.places, other.places),
        )


@dataclass(frozen=True)
class Scan:
    """What one scanner answered of one place. `gaps` are what it could not tell; `raw` is its own answer."""

    tool: str
    place: str
    looked_at: int
    found: tuple[Advisory, ...]
    gaps: tuple[str, ...]
    raw: str


def canonical(package: str) -> str:
    """PEP 503's form of a name; npm's names are left as they are but for their case."""
    return re.sub(r"[-_.]+", "-", package).lower()


def merged(found: Iterable[Advisory]) -> list[Advisory]:
    """One row for each vulnerability, the worst first."""
    rows: list[Advisory] = []
    for advisory in found:
        same = [row for row in rows if row.same_as(advisory)]
        rows = [row for row in rows if row not in same]
        for row in same:  # two that had no id in common until now
            advisory = row.joined(advisory)
        rows.append(advisory)
    return sorted(rows, key=lambda row: (-row.severity, row.package, row.name))


def _both(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
