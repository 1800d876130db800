"""Checklists from `checklists/*.toml`: texts in both languages, owners and due dates.

Reports have the English texts; forms and pages show the environment's language, by the catalogue that `make messages`
makes of these files (runbook/language/ja/checklists.po). The drill of §8.4 ticks the same boxes by measurement.
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
    """One box. `ja`: as the manual writes it, where it is the manual's; `how`: how to do or prove it; an undone `must`
    is CRITICAL; `measured`: the key of a drill's measurement (empty: only a person can check it)."""

    id: str
    en: str
    ja: str
    how: str
    how_ja: str
    must: bool = False
    measured: str = ""


@dataclass(frozen=True)
class Phase:
    """Boxes of one form. `minutes`: the manual's (0: it gives none)."""

    id: str
    en: str
    ja: str
    boxes: tuple[Box, ...]
    minutes: int = 0
    note: str = ""
    note_ja: str = ""

    @property
    def short(self) -> str:
        """`fault detection` of `Phase 1, fault detection`."""
        return self.en.partition(", ")[2]

    @property
    def heading(self) -> str:
        """`Phase 1, fault detection (15 min)`."""
        note = self.note or (f"{self.minutes} min" if self.minutes else "")
        return f"{self.en} ({note})" if note else self.en

    @property
    def heading_ja(self) -> str:
        """As the manual writes it: `フェーズ1: 障害検知（15分）`."""
        note = self.note_ja or (_written(self.minutes) if self.minutes else "")
        return f"{self.ja}（{note}）" if note else self.ja


@dataclass(frozen=True)
class Checklist:
    """`due_days` count from the drill's day (None: no drill), `answer_days` from the launch."""

    name: str
    en: str
    ja: str
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
