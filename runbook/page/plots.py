"""Pictures of a report: bars as long as numbers, shares of a whole, numbers over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from runbook.page.render import LEFT, ROW, WIDTH

BAR = "#5c7cfa"
TALL = 48
RIGHT = 120
# From "no expiry" (red: nothing but a client removes it) over soon to late.
SHADES = ("#d6336c", "#fab005", "#94d82d", "#38d9a9", "#4dabf7", "#5f3dc4")
MOST_LETTERS = 32


@dataclass(frozen=True)
class Bar:
    """A line of a picture: its parts side by side, and what stands behind them."""

    label: str
    parts: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Trace:
    """A number over time: points from left (0) to right (1), the limit that it is to stay below, and the newest as
    text."""

    label: str
    points: tuple[tuple[float, float], ...]
    limit: float
    text: str


def traces(lines: Sequence[Trace]) -> str:
    """A small curve for each, from 0 up, its limit dashed; what is over the limit is red."""
    return _picture([_trace(number, line) for number, line in enumerate(lines)], TALL)


def bars(lines: Sequence[Bar]) -> str:
    """A bar for each line, the longest as wide as the picture."""
    longest = max((sum(line.parts) for line in lines), default=0) or 1
    return _picture([_line(number, line, longest, (BAR,)) for number, line in enumerate(lines)])


def shares(lines: Sequence[Bar], names: Sequence[str]) -> str:
    """A bar for each line, all of the same width, parted by shares; the last line says the colours."""
    drawn = [_line(number, line, sum(line.parts) or 1, SHADES) for number, line in enumerate(lines)]
    return _picture([*drawn, _legend(len(lines), names)])


def _line(number: int, line: Bar, whole: float, colours: Sequence[str]) -> str:
    y, x = 6 + number * ROW, float(LEFT)
    label = line.label if len(line.label) <= MOST_LETTERS else line.label[: MOST_LETTERS - 1] + "…"
    drawn = [f'<text x="{LEFT - 8}" y="{y + 13}" fill="#343a40" text-anchor="end">{escape(label)}</text>']
    for part, colour in zip(line.parts, colours, strict=True):
        width = part / whole * (WIDTH - LEFT - RIGHT)
        if width > 0:
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>')
        x += width
    drawn.append(f'<text x="{x + 6:.1f}" y="{y + 13}" fill="#495057">{escape(line.text)}</text>')
    return "".join(drawn)


def _trace(number: int, line: Trace) -> str:
    top, width = 8 + number * TALL, WIDTH - LEFT - RIGHT
    highest = max([line.limit, *(value for _, value in line.points)]) * 1.1 or 1.0

    def height(value: float) -> float:
        return top + (TALL - 12) * (1 - max(value, 0.0) / highest)

    places = [(LEFT + min(max(at, 0.0), 1.0) * width, height(value), value) for at, value in line.points]
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    over = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" fill="{SHADES[0]}"/>'
        for x, y, value in places
        if value > line.limit
    )
    limit, base = height(line.limit), top + TALL - 12
    return (
        f'<text x="{LEFT - 8}" y="{base - 6}" fill="#343a40" text-anchor="end">{escape(line.label)}</text>'
        f'<line x1="{LEFT}" y1="{base}" x2="{LEFT + width}" y2="{base}" stroke="#ced4da"/>'
        f'<line x1="{LEFT}" y1="{limit:.1f}" x2="{LEFT + width}" y2="{limit:.1f}" stroke="#fab005" '
        f'stroke-dasharray="4 3"/><polyline points="{curve}" fill="none" stroke="{BAR}" stroke-width="1.4"/>{over}'
        f'<text x="{LEFT + width + 6}" y="{base - 6}" fill="#495057">{escape(line.text)}</text>'
    )


def _legend(number: int, names: Sequence[str]) -> str:
    y, step = 12 + number * ROW, (WIDTH - LEFT) / len(names)
    return "".join(
        f'<rect x="{LEFT + place * step:.0f}" y="{y}" width="12" height="12" fill="{colour}"/>'
        f'<text x="{LEFT + place * step + 17:.0f}" y="{y + 11}" fill="#495057">{escape(name)}</text>'
        for place, (name, colour) in enumerate(zip(names, SHADES, strict=True))
    )


def _picture(lines: Sequence[str], row: int = ROW) -> str:
    height = row * len(lines) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(lines)}</svg>"
    )
