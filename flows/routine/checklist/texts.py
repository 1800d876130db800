"""Checklists from `checklists/*.toml`: the manual's words, owners and due dates.

The drill of §8.4 ticks the same boxes by measurement.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Literal, get_args

from runbook.errors import OpsError

ChecklistName = Literal[
    "drill_preparation", "drill_day", "drill_follow_up", "security_audit", "architecture_review", "cost_review"
]
DEFAULT: ChecklistName = "drill_preparation"
"""The default of run-checklist: the parameters of such a run name no checklist."""
NAMES: tuple[ChecklistName, ...] = get_args(ChecklistName)
DRILL: tuple[ChecklistName, ...] = ("drill_preparation", "drill_day", "drill_follow_up")
DIRECTORY = Path(__file__).parents[1] / "checklists"


@dataclass(frozen=True)
class Box:
    """One box. `how`: how to do or prove it; an undone `must` is CRITICAL; `measured`: the key of a drill's measurement
    (empty: only a person can check it)."""

    id: str
    text: str
    how: str
    must: bool = False
    measured: str = ""


@dataclass(frozen=True)
class Phase:
    """Boxes of one form. `minutes`: the manual's (0: it gives none)."""

    id: str
    title: str
    boxes: tuple[Box, ...]
    minutes: int = 0
    note: str = ""

    @property
    def heading(self) -> str:
        """As the manual writes it: `フェーズ1: 障害検知（15分）`."""
        note = self.note or (_written(self.minutes) if self.minutes else "")
        return f"{self.title}（{note}）" if note else self.title


@dataclass(frozen=True)
class Checklist:
    """`due_days` count from the drill's day (None: no drill), `answer_days` from the launch."""

    name: str
    title: str
    section: str
    owner: str
    answer_days: int
    phases: tuple[Phase, ...]
    due_days: int | None = None

    @property
    def boxes(self) -> list[tuple[Phase, Box]]:
        """All boxes with their phases."""
        return [(phase, box) for phase in self.phases for box in phase.boxes]

    def due(self, launched: date, due: str = "", drill_date: str = "") -> date:
        """The last day to answer: `due` if given, else from the drill's day, else from the launch.

        Raises:
            OpsError: a text is not a date.
        """
        if due.strip():
            return _day("due", due)
        if drill_date.strip() and self.due_days is not None:
            return _day("drill_date", drill_date) + timedelta(days=self.due_days)
        return launched + timedelta(days=self.answer_days)


@functools.cache
def checklist(name: ChecklistName) -> Checklist:
    """The checklist of that name.

    Raises:
        OpsError: there is none.
    """
    if name not in NAMES:
        raise OpsError(f"there is no checklist “{str(name)[:40]}”", f"choose one of {', '.join(NAMES)}")
    content = tomllib.loads((DIRECTORY / f"{name}.toml").read_text(encoding="utf-8"))
    phases = [
        Phase(**{**phase, "boxes": tuple(Box(**box) for box in phase["boxes"])}) for phase in content.pop("phases")
    ]
    return Checklist(name=name, phases=tuple(phases), **content)


def _written(minutes: int) -> str:
    return f"{minutes // 60}時間" if minutes % 60 == 0 else f"{minutes}分"


def _day(parameter: str, text: str) -> date:
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise OpsError(
            f"{parameter} “{text[:20]}” is not a date", "write it like 2026-03-31, or leave it empty"
        ) from None
