"""Advisories of all scanners in one format; the same vulnerability of several scanners is one row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tasks.dependencies.severity import Severity


@dataclass(frozen=True)
class Advisory:
    """A known vulnerability of an installed package. `fixed`: empty if no fixed version is known."""

    ids: tuple[str, ...]
    package: str
    versions: tuple[str, ...]
    severity: Severity
    fixed: tuple[str, ...]
    summary: str
    places: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its best-known id: a CVE, else a GHSA, else the scanner's id."""
        return next((one for prefix in ("CVE-", "GHSA-") for one in self.ids if one.startswith(prefix)), self.ids[0])

    def is_called(self, wanted: str) -> bool:
        """Whether `wanted` is one of its ids."""
        return wanted.upper() in {one.upper() for one in self.ids}

    def same_as(self, other: Advisory) -> bool:
        """Whether both are the same vulnerability of the same package: they share an id."""
        same = {one.upper() for one in self.ids} & {one.upper() for one in other.ids}
        return bool(same) and canonical(self.package) == canonical(other.package)

    def joined(self, other: Advisory) -> Advisory:
        """Both in one: the worse severity, all ids, versions, fixes and places."""
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
    """A scanner's answer for one place. `gaps`: what it skipped; `raw`: its original answer."""

    tool: str
    place: str
    checked: int
    found: tuple[Advisory, ...]
    gaps: tuple[str, ...]
    raw: str


def canonical(package: str) -> str:
    """A package name in PEP 503's form; npm names only in lower case."""
    return re.sub(r"[-_.]+", "-", package).lower()


def merged(found: Iterable[Advisory]) -> list[Advisory]:
    """One row for each vulnerability, the worst first."""
    rows: list[Advisory] = []
    for advisory in found:
        same = [row for row in rows if row.same_as(advisory)]
        rows = [row for row in rows if row not in same]
        for row in same:  # two that shared no id until now
            advisory = row.joined(advisory)
        rows.append(advisory)
    return sorted(rows, key=lambda row: (-row.severity, row.package, row.name))


def _both(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
