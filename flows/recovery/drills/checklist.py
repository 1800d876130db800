"""The training checklist of §8.4: what a machine has checked in a drill, and what a person must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flows.routine.checklist import texts
from flows.routine.checklist.texts import DRILL, Phase
from runbook.report import Report


class Box(NamedTuple):
    """One box: its part of the checklist, its text, and the key by which a drill says that a machine has checked it
    (empty: only a person can)."""

    part: str
    text: str
    key: str = ""


def _part(phase: Phase) -> str:
    """The minutes of the phases are told apart."""
    return phase.title if phase.minutes else phase.heading


BOXES = tuple(Box(_part(phase), box.text, box.measured) for name in DRILL for phase, box in texts.checklist(name).boxes)


def report_results(report: Report, done: Mapping[str, str]) -> None:
    """Every box; and once more, by themselves, those that nobody has checked yet."""
    rows = [(box.part, _mark(box, done), box.text, _who(box, done)) for box in BOXES]
    report.table("Training checklist (§8.4)", ("part", "", "box", "checked by"), rows)
    open_boxes = [
        (box.part, box.text, "a person must" if not box.key else "this scenario does not touch it")
        for box in BOXES
        if box.key not in done
    ]
    report.table("Not checked in this drill", ("part", "what", "why"), open_boxes)


def _mark(box: Box, done: Mapping[str, str]) -> str:
    return "☑" if box.key in done else "☐"


def _who(box: Box, done: Mapping[str, str]) -> str:
    if box.key in done:
        return f"machine: {done[box.key]}"
    return "not checked: this scenario does not touch it" if box.key else "not checked: a person must"
