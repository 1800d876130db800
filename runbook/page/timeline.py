"""When each step of a run ran, as SVG.

Drawn here and not by matplotlib (runbook/page/plots.py): every report has this picture, and a run of a few seconds
would pay matplotlib's import each time: 1.1 s of processor time and 60 MB, measured, some 670 times a day.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape

from runbook.language.say import label
from runbook.report import Report, Status, StepTime

INK, GRID, CARD = "#57606a", "#57606a55", '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
"""Texts, lines, and a white card under both: the UI's pages are light (#eaeaeb) or dark (#26272b), and no grey has a
contrast of 4.5, which small text needs, on both."""
COLOUR = {Status.OK: "#2f9e62", Status.WARN: "#d9a400", Status.CRITICAL: "#d6336c", Status.PLANNED: "#5c7cfa"}
ROW, LEFT, RIGHT, WIDTH = 22, 230, 60, 700
"""Pixels. The UI shows reports 590 pixels wide at a desk: a wider picture would have smaller letters there."""
MOST_STEPS = 200
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14_400)
MOST_TICKS = 8


def timeline(report: Report) -> str:
    """A bar for each step, in the order of their starts; of many steps, the longest."""
    longest = sorted(report.steps, key=lambda step: -step.seconds)[:MOST_STEPS]
    return spans(sorted(longest, key=lambda step: step.started), report.started)


def spans(steps: Sequence[StepTime], origin: datetime) -> str:
    """A bar for each step on one axis of seconds since `origin`."""
    whole = max(((s.started - origin).total_seconds() + s.seconds for s in steps), default=1) or 1
    scale = (WIDTH - LEFT - RIGHT) / whole
    height = ROW * (len(steps) + 1) + 10
    tick = next((one for one in TICKS if whole / one <= MOST_TICKS), whole / MOST_TICKS)
    ticks = "".join(_tick(number * tick, scale, height) for number in range(int(whole / tick) + 1))
    bars = "".join(_bar(index, step, origin, scale) for index, step in enumerate(steps))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">{CARD}{ticks}{bars}</svg>'
    )


def _tick(seconds: float, scale: float, height: int) -> str:
    x = LEFT + seconds * scale
    return (
        f'<line x1="{x:.0f}" y1="4" x2="{x:.0f}" y2="{height - ROW}" stroke="{GRID}"/>'
        f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{_label(seconds)}</text>'
    )


def _label(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def _bar(index: int, step: StepTime, origin: datetime, scale: float) -> str:
    x = LEFT + (step.started - origin).total_seconds() * scale
    y, width = 6 + index * ROW, max(step.seconds * scale, 2)
    return (
        f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(label(step.name))}</text>'
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" rx="3" fill="{COLOUR[step.status]}"/>'
        f'<text x="{x + width + 5:.1f}" y="{y + 13}">{step.seconds:.1f} s</text>'
    )
