"""A recovery point: the newest moment to which one means could bring one resource back now (§8.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Resource = Literal["database", "redis", "files"]
Means = Literal["standby", "point in time", "replica", "backup"]
Place = Literal["live", "backups", "copies"]
Danger = Literal["server lost", "data corrupted", "region lost"]
FOLLOWING = ("standby", "replica")
"""They do what the master does, its mistakes too."""


@dataclass(frozen=True)
class Point:
    """What one means could bring back now.

    `at` None: nothing; `problem` says why. `unknown`: it could not be read, so it may be there all the same. `exact`
    false: at least up to `at`, perhaps further. `proven`: since when it is known that this way works ("" never): a
    restore of this very backup was proven, or a server answered just now. `every_seconds`: the longest time between two
    of the last backups, 0 where it goes on continuously. `bytes` are what an estimate goes by; `restored_bytes` what it
    takes on the disk. `beside`: it is on the very host of what it is to bring back, and goes with it.
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
        """Under which its durations are measured: `database point in time`."""
        return f"{self.resource} {self.means}"

    @property
    def told(self) -> str:
        """For people."""
        where = {"live": "", "backups": "", "copies": ", from the copies"}[self.place]
        return f"{self.means}{where}{f' ({self.name})' if self.name else ''}"

    def serves(self, danger: Danger) -> bool:
        """Whether it is a means at all. `server lost`: the server with its disk is gone; `region lost`: this site is,
        with the first stores and the WAL receiver."""
        match danger:
            case "region lost":
                return self.place == "copies" and not self.beside
            case "data corrupted":
                return self.means not in FOLLOWING
        return not self.beside

    def loss_seconds(self, now: datetime) -> float | None:
        """What would be lost, at most; None where nothing can be brought back."""
        return max(0.0, (now - self.at).total_seconds()) if self.at else None


def best_of(points: Iterable[Point]) -> Point | None:
    """The newest; of equal ones one that is proven, then what follows already and is there at once."""
    found = [point for point in points if point.at]
    return max(found, key=lambda one: (one.at, bool(one.proven), one.means in FOLLOWING, one.name), default=None)
