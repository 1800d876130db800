"""Pictures of a report, as SVG by matplotlib: bars, shares of a whole, values over time.

Only the first picture imports matplotlib: no recovery pays for it. Texts stay texts, in the browser's own fonts, so
that Japanese is legible. Each picture is on a white card, in the light and in the dark theme of the Prefect UI. The
same values give the same bytes.
"""

from __future__ import annotations

import functools
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any

from prefect.settings import PREFECT_HOME

from runbook.page.timeline import CARD, INK, WIDTH
from runbook.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, LIMIT = "#5c7cfa", "#e08600"
# From "no expiry" (red: only a client deletes it) over soon to late.
SHADES = ("#d6336c", "#e5a50a", "#74a81e", "#22a884", "#4dabf7", "#7a5cd6")
ROW, TALL, FOOT, TOP = 22, 90, 44, 6
FONT, MOST_EMS, MOST_LINES = 12, 28, 200
# What matplotlib repeats in every text: a third of a picture's bytes.
_FONT, _UNTURNED = (
    "font-size: 12px; font-family: 'DejaVu Sans', sans-serif; ",
    re.compile(r' transform="rotate\(-?0 [^"]*"'),
)


@dataclass(frozen=True)
class Bar:
    """A line of a picture: its parts, and the text behind them."""

    label: str
    parts: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Trace:
    """A value over time. `unit` as in `bars`; `limit`: what it must not exceed (dashed); `text`: the newest value."""

    label: str
    points: Sequence[tuple[datetime, float]]
    text: str
    unit: str = ""
    limit: float | None = None


def bars(lines: Sequence[Bar], unit: str = "") -> str:
    """A bar for each line. `unit`: of the axis, as `Metric.unit` has it (`B`, `ratio`, `s`), or another text."""
    return _rows(lines, unit, (BAR,), ())


def shares(lines: Sequence[Bar], names: Sequence[str]) -> str:
    """A bar for each line, all of the same width, divided into shares called `names`."""
    wholes = [sum(line.parts) or 1 for line in lines]
    divided = [
        Bar(line.label, tuple(part / whole for part in line.parts), line.text)
        for line, whole in zip(lines, wholes, strict=True)
    ]
    return _rows(divided, "ratio", SHADES[: len(names)], names)


def traces(lines: Sequence[Trace], zone: tzinfo = UTC) -> str:
    """A curve for each, one below the other, all over the same time, which the axis shows in `zone`. Values over their
    limit are red."""
    left, right = _column([line.label for line in lines]) + 50, _column([line.text for line in lines])
    figure, found = _figure(len(lines) * TALL, left, right, len(lines))
    for axes, line in zip(found, lines, strict=True):
        _trace(axes, line)
    _time_axis(found, lines, zone)
    return _svg(figure)


def _rows(lines: Sequence[Bar], unit: str, colours: Sequence[str], names: Sequence[str]) -> str:
    shown = [*lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(Bar(f"… {len(lines) - MOST_LINES:,} more", (0.0,) * len(colours), ""))
    labels = [_cut(line.label) for line in shown]
    figure, (axes,) = _figure(max(len(shown), 1) * ROW, _column(labels), _column([line.text for line in shown]))
    places = range(len(shown))
    starts = [0.0] * len(shown)
    for part, colour in enumerate(colours):
        widths = [line.parts[part] for line in shown]
        for number, bar in enumerate(axes.barh(places, widths, 0.72, left=starts, color=colour)):
            bar.set_gid(f"bar-{number}-{part}")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, line, end in zip(places, shown, starts, strict=True):
        axes.annotate(
            _clean(line.text), (end, place), (6, 0), textcoords="offset points", va="center", annotation_clip=False
        )
    axes.set_yticks(places, labels)
    axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    axes.set_xlim(0, max(starts, default=0) or 1)
    _value_axis(axes.xaxis, unit)
    axes.grid(axis="x")
    if names:
        handles = [_drawing().patches.Patch(color=colour) for colour in colours]
        figure.legend(handles, list(names), loc="lower center", ncols=len(names), frameon=False, labelcolor=INK)
    return _svg(figure)


def _trace(axes: Axes, line: Trace) -> None:
    at, values = [when for when, _ in line.points], [value for _, value in line.points]
    axes.plot(at, values, color=BAR, linewidth=1.4, marker="." if len(at) < 60 else "", gid="curve")  # type: ignore[arg-type]
    highest = max([*values, line.limit or 0.0]) or 1.0
    if line.limit is not None:
        axes.axhline(line.limit, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.2, gid="limit")
        over = [value if value > line.limit else float("nan") for value in values]
        axes.plot(at, over, ".", color=SHADES[0], markersize=4, gid="over")  # type: ignore[arg-type]
    axes.set_ylim(0, highest * 1.15)
    _value_axis(axes.yaxis, line.unit, most=3)
    axes.grid(axis="y")
    axes.annotate(_cut(line.label), (0, 0.5), (-60, 0), "axes fraction", "offset points", va="center", ha="right")
    axes.annotate(
        _clean(line.text), (1, 0.5), (6, 0), "axes fraction", "offset points", va="center", annotation_clip=False
    )


def _time_axis(found: Sequence[Axes], lines: Sequence[Trace], zone: tzinfo) -> None:
    """The same time for all; only the lowest one has labels."""
    times = [when for line in lines for when, _ in line.points]
    dates = _drawing().dates
    for axes in found:
        if times:
            axes.set_xlim(min(times), max(*times, min(times) + timedelta(minutes=1)))  # type: ignore[arg-type]
        locator = dates.AutoDateLocator(tz=zone, maxticks=8)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, tz=zone))
        axes.xaxis.set_tick_params(labelbottom=axes is found[-1])
        axes.grid(axis="x")
    if found:
        found[-1].set_xlabel(str(zone))


def _value_axis(axis: Any, unit: str, most: int = 6) -> None:
    ticker = _drawing().ticker
    axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10]))
    show: dict[str, Callable[[float, object], str]] = {
        "B": lambda value, _: size(value),
        "ratio": lambda value, _: f"{value * 100:.4g} %",
    }
    spaced = f" {unit}" if unit else ""
    axis.set_major_formatter(show.get(unit, lambda value, _: f"{value:,.6g}{spaced}"))


def _figure(height: float, left: float, right: float, number: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """A picture of `number` plots below each other, `height` pixels in all, with room for the texts at both sides."""
    whole = height + FOOT + TOP
    figure = _drawing().figure.Figure(figsize=(WIDTH / 72, whole / 72), dpi=72)
    each, gap = height / max(number, 1), 14 if number > 1 else 0
    found = []
    for place in range(number):
        bottom = FOOT + height - (place + 1) * each + gap / 2
        box = (left / WIDTH, bottom / whole, (WIDTH - left - right) / WIDTH, (each - gap) / whole)
        axes = figure.add_axes(box)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
        found.append(axes)
    return figure, found


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has one
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_FONT, "").replace('pt" ', '" ', 2)
    text = _UNTURNED.sub("", text).replace("<svg ", '<svg font-family="sans-serif" font-size="12" ', 1)
    opened = text.index(">") + 1
    return text[:opened] + CARD + text[opened:]


def _column(texts: Sequence[str]) -> float:
    """Pixels for the longest of these texts."""
    return min(max(map(_ems, texts), default=0.0), MOST_EMS) * FONT * 0.62 + 16


def _ems(text: str) -> float:
    """Its width in Latin letters: matplotlib's own font has no Japanese, and would guess."""
    return sum(1.65 if unicodedata.east_asian_width(letter) in "WF" else 1.0 for letter in text)


def _clean(text: str) -> str:
    """One line without control characters and lone surrogates, which XML does not allow."""
    return "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))


def _cut(text: str) -> str:
    text = _clean(text)
    while _ems(text) > MOST_EMS:
        text = text[:-2] + "…"
    return text


@functools.cache
def _drawing() -> Any:
    """matplotlib, with this project's style."""
    # The home of a service's user may not exist; Prefect's own directory does.
    os.environ.setdefault("MPLCONFIGDIR", str(PREFECT_HOME.value() / "matplotlib"))
    import matplotlib
    import matplotlib.dates
    import matplotlib.figure
    import matplotlib.patches
    import matplotlib.ticker

    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color", "axes.edgecolor")
    style: Any = dict.fromkeys(ink, INK)
    matplotlib.rcParams.update(
        style
        | {
            "font.size": FONT,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "sans-serif"],
            "text.parse_math": False,
            "grid.alpha": 0.3,
            "axes.axisbelow": True,
            "svg.fonttype": "none",
            "svg.hashsalt": "interview-ops",
        }
    )
    return matplotlib
