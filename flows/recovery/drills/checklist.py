"""The training checklist of §8.4: which boxes the drill has checked, and which a person must check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flows.routine.checklist import texts
from flows.routine.checklist.texts import DRILL, Phase
from runbook.report import Report


class DrillBox(NamedTuple):
    """One box: its part of the checklist, its text, and the key with which a drill checks it ("": a person must)."""

    part: str
    text: str
    key: str = ""


def _part(phase: Phase) -> str:
    """Without the minutes, which the table of phases has."""
    return phase.en if phase.minutes else phase.heading


BOXES = tuple(
    DrillBox(_part(phase), box.en, box.measured) for name in DRILL for phase, box in texts.checklist(name).boxes
)


def report_results(report: Report, done: Mapping[str, str]) -> None:
    """A table of every box, and one of the boxes that are not checked."""
    rows = [(box.part, _mark(box, done), box.text, _who(box, done)) for box in BOXES]
    report.table("Training checklist (§8.4)", ("part", "", "box", "checked by"), rows)
    open_boxes = [
        (box.part, box.text, "a person must check it" if not box.key else "not part of this scenario")
        for box in BOXES
        if box.key not in done
    ]
    report.table("Not checked in this drill", ("part", "box", "why"), open_boxes)


def _mark(box: DrillBox, done: Mapping[str, str]) -> str:
    return "☑" if box.key in done else "☐"


def _who(box: DrillBox, done: Mapping[str, str]) -> str:
    if box.key in done:
        return f"machine: {done[box.key]}"
    return "not part of this scenario" if box.key else "a person must check it"
