"""Pictures of a report: bars as long as numbers, and shares of a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from runbook.render import LEFT, ROW, WIDTH

BAR = "#5c7cfa"
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


def _legend(number: int, names: Sequence[str]) -> str:
    y, step = 12 + number * ROW, (WIDTH - LEFT) / len(names)
    return "".join(
        f'<rect x="{LEFT + place * step:.0f}" y="{y}" width="12" height="12" fill="{colour}"/>'
        f'<text x="{LEFT + place * step + 17:.0f}" y="{y + 11}" fill="#495057">{escape(name)}</text>'
        for place, (name, colour) in enumerate(zip(names, SHADES, strict=True))
    )


def _picture(lines: Sequence[str]) -> str:
    height = ROW * len(lines) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(lines)}</svg>"
    )
