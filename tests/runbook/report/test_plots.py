"""Pictures by matplotlib: XML, legible in both themes, the same bytes for the same values, imported only when drawn."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from runbook.page.plots import BAR, MOST_LINES, SHADES, Bar, Trace, bars, shares, traces
from runbook.page.timeline import CARD, COLOUR, INK, spans
from runbook.report import Status, StepTime

NASTY = "候補者 <a> & $x_1$ %d \"q'"
BEGIN = datetime(2026, 11, 28, 3, tzinfo=UTC)


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_bars_are_as_long_as_their_values_on_an_axis_with_round_ticks_and_units() -> None:
    lines = [Bar(NASTY, (1.3e9,), "1.3 GB"), Bar("zero", (0.0,), "0 B"), Bar("half", (0.65e9,), NASTY)]
    svg = bars(lines, "B")
    assert svg == bars(lines, "B")
    assert [text for text in texts(svg) if text in ("0 B", "500.0 MB", "1.0 GB")] == [
        "0 B",
        "500.0 MB",
        "1.0 GB",
        "0 B",
    ]
    assert texts(svg).count(NASTY) == 2, "text, as it is: the browser has the font"
    paths = [re.findall(r"[ML] ([\d.]+)", re.search(rf'id="bar-{n}-0">\s*<path d="([^"]*)"', svg)[1]) for n in range(3)]  # type: ignore[index]
    long, none, half = (max(map(float, x)) - min(map(float, x)) for x in paths)
    assert (none, round(half / long, 3)) == (0, 0.5)
    drawn = shares([Bar("a", (1.0, 0.0, 3.0), "4 keys"), Bar("empty", (0.0, 0.0, 0.0), "0 keys")], ["x", "y", "z"])
    assert [text for text in texts(drawn) if text in ("0 %", "100 %", "x", "y", "z")] == ["0 %", "100 %", "x", "y", "z"]
    assert texts(bars([])) != ["not XML"]
    assert "a··b c" in texts(bars([Bar("a\x00\udcffb\nc", (1.0,), "\x1b[0m")]))


def test_a_picture_of_very_many_lines_stays_below_what_the_ui_shows() -> None:
    svg = bars([Bar(f"line {number}", (number,), NASTY) for number in range(1000)], "s")
    assert len(svg) < 200_000
    assert f"… {1000 - MOST_LINES} more" in texts(svg)


def test_a_curve_has_its_limit_and_what_is_over_it_in_red_over_time_in_the_operators_zone() -> None:
    day = [(BEGIN + timedelta(minutes=number), 0.95 if number == 700 else 0.2) for number in range(0, 1440, 5)]
    lines = [
        Trace("host.cpu <1>", day, "40 %", "ratio", 0.8),
        Trace("never measured", (), "not measured", "s", 1.0),
        Trace("no limit", [(BEGIN, 5.0)], "5", "requests"),
    ]
    svg = traces(lines, ZoneInfo("Asia/Tokyo"))
    assert svg == traces(lines, ZoneInfo("Asia/Tokyo"))
    assert svg.count('id="limit"') == 2
    over = re.search(r'id="over">.*?<g clip-path[^>]*>(.*?)</g>', svg, re.DOTALL)
    assert over
    assert over[1].count("<use") == 1
    assert SHADES[0] in over[1]
    assert {"host.cpu <1>", "40 %", "50 %", "4 requests", "16:00", "Asia/Tokyo"} <= set(texts(svg))
    assert traces([])


def test_colours_are_legible_on_the_card_that_each_picture_has_in_both_themes() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    def contrast(colour: str) -> float:
        return (luminance(card) + 0.05) / (luminance(colour) + 0.05)

    (card,) = re.findall('fill="(#[0-9a-f]{6})"', CARD)
    assert contrast(INK) >= 4.5, "what WCAG asks for, of small text"
    assert min(map(contrast, (BAR, *SHADES, *COLOUR.values()))) >= 2
    step = StepTime("read", BEGIN, 1.0, Status.OK)
    for svg in (bars([Bar("a", (1.0,), "1")]), spans([step], BEGIN)):
        (first, *others) = ElementTree.fromstring(svg)  # noqa: S314 - our own
        assert (first.get("width"), first.get("height"), first.get("fill")) == ("100%", "100%", card), "under the rest"
        assert others
        assert svg.count(card) == 1, "nothing else is drawn in its colour"


def test_neither_a_recovery_nor_the_watcher_imports_what_draws_and_calculates() -> None:
    """Each takes about a second of processor time to import."""
    script = (
        "import sys, flows.recovery.full_restore, flows.recovery.point, flows.monitoring.serve, flows.routine.monthly;"
        "print([name for name in ('pandas', 'matplotlib', 'great_expectations') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
