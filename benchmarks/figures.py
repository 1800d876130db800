"""What was measured, beside its bar: as a Markdown table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook.page.render import table
from runbook.units import size

COLUMNS = ("what", "ours", "peer", "ratio or figure", "bar", "holds")


@dataclass(frozen=True)
class Figure:
    """One line. `ours` and `peer` are medians in seconds; `value` is what is compared with `bar`, None where no bar
    was set. `unit` is "" for a ratio, "s" for seconds."""

    name: str
    value: float
    bar: float | None = None
    ours: float | None = None
    peer: float | None = None
    unit: str = ""
    shown: str = ""

    @classmethod
    def ratio(cls, name: str, ours: Sequence[float], peer: Sequence[float], bar: float | None = None) -> Figure:
        """Median against median."""
        mine, other = statistics.median(ours), statistics.median(peer)
        return cls(name, mine / other, bar, mine, other)

    @classmethod
    def seconds(cls, name: str, ours: Sequence[float], bar: float | None = None) -> Figure:
        """A median of seconds by itself."""
        mine = statistics.median(ours)
        return cls(name, mine, bar, mine, unit="s")

    @classmethod
    def bytes(cls, name: str, values: Sequence[int], bar: int | None = None) -> Figure:
        """A median of bytes by itself."""
        middle = statistics.median(values)
        return cls(name, middle, bar, unit="B", shown=size(middle))

    @property
    def holds(self) -> bool | None:
        """None where there is no bar."""
        return None if self.bar is None else self.value <= self.bar

    def row(self) -> tuple[str, ...]:
        """For the table."""
        value = self.shown or (f"{self.value:.2f} {self.unit}".strip())
        bar = "" if self.bar is None else size(self.bar) if self.unit == "B" else f"{self.bar:g} {self.unit}".strip()
        holds = {None: "", True: "yes", False: "no"}[self.holds]
        return self.name, _seconds(self.ours), _seconds(self.peer), value, bar and f"≤ {bar}", holds


def as_table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    return table(COLUMNS, [figure.row() for figure in figures])


def write_json(path: Path, figures: Sequence[Figure]) -> None:
    """`[{name, ours_seconds, peer_seconds, ratio, bar}]`; what has no unit of seconds or no peer has null there.

    The ratio of a figure in seconds that has a bar and no peer is null: compare `ours_seconds` with `bar`.
    """
    rows = [
        {
            "name": figure.name,
            "ours_seconds": _rounded(figure.ours),
            "peer_seconds": _rounded(figure.peer),
            "ratio": None if figure.unit else _rounded(figure.value),
            "bar": figure.bar,
        }
        for figure in figures
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
