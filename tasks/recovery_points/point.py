"""A recovery point: the newest time to which one means could restore one resource now (§8.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from runbook.guard.loss import Loss

Resource = Literal["database", "redis", "files"]
Means = Literal["standby", "point in time", "replica", "backup"]
Place = Literal["live", "backups", "copies"]
Danger = Literal["server lost", "data corrupted", "region lost"]
FOLLOWING = ("standby", "replica")
"""They repeat what the master does, mistakes included."""


@dataclass(frozen=True)
class Point:
    """What one means could restore now.

    `at`: up to when; None: nothing (`problem`). `unknown`: it could not be read, and may exist. `exact` false: at least
    up to `at`. `proven`: since when the means is known to work ("" never), by a verified restore of this backup or an
    answer of the server. `every_seconds`: the longest time between two recent backups; 0: continuous. `bytes`: the
    input of an estimate; `restored_bytes`: the bytes needed on disk. `beside`: it is on the resource's host, and is
    lost with it.
    """

    resource: Resource
    means: Means
    place: Place
    name: str = ""
    at: datetime | None = None
    exact: bool = True
    proven: str = ""
    bytes: int = 0
    restored_bytes: int = 0
    every_seconds: float = 0.0
    problem: str = ""
    hint: str = ""
    unknown: bool = False
    beside: bool = False
    detail: str = ""

    @property
    def way(self) -> str:
        """The name of its measured durations: `database point in time`."""
        return f"{self.resource} {self.means}"

    @property
    def told(self) -> str:
        """The means, with its place and name."""
        where = {"live": "", "backups": "", "copies": ", from the copies"}[self.place]
        return f"{self.means}{where}{f' ({self.name})' if self.name else ''}"

    def serves(self, danger: Danger) -> bool:
        """Whether it survives the danger. `server lost`: the server and its disk are lost; `region lost`: this site is,
        with `backups` and the WAL receiver."""
        match danger:
            case "region lost":
                return self.place == "copies" and not self.beside
            case "data corrupted":
                return self.means not in FOLLOWING
        return not self.beside

    def loss(self, part: str, now: datetime) -> Loss:
        """The loss of the resource, which reports call `part`."""
        if self.at is None:
            return Loss.not_known(part, self.problem) if self.unknown else Loss.everything(part)
        if not self.exact:
            return Loss.at_most_since(part, self.at)
        return Loss.everything_since(part, self.at) if self.at < now else Loss(part)

    def loss_seconds(self, now: datetime) -> float | None:
        """The loss at most, for the comparison with the RPO; None where nothing can be restored."""
        return max(0.0, (now - self.at).total_seconds()) if self.at else None


def best_of(points: Iterable[Point]) -> Point | None:
    """The newest; among equal ones a proven one, then one that is available at once."""
    found = [point for point in points if point.at]
    return max(found, key=lambda one: (one.at, bool(one.proven), one.means in FOLLOWING, one.name), default=None)
