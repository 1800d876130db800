"""Figures over the past months: kept as a table in each report, read back from those before, and drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from flows.routine.page import Page
from runbook.page import render
from runbook.page.plots import Bar, bars
from runbook.report import Evidence
from tasks.reports.past import filed

TABLE = "Figures"
COLUMNS = ("figure", "value", "shown", "limit")
MOST_REPORTS, SOON_DAYS, DAY_SECONDS = 24, 90, 86_400


@dataclass(frozen=True)
class Figure:
    """A number of today. `limit`: at which it is full; 0 where it has none."""

    name: str
    value: float
    shown: str
    limit: float = 0.0


Series = Sequence[tuple[datetime, float, str]]


def past(page: Page) -> Mapping[str, list[tuple[datetime, float, str]]]:
    """Of the reports of this runbook before this one: figure → when, value, as shown; the earliest first."""
    found = defaultdict[str, list[tuple[datetime, float, str]]](list)
    reports = filed(page.env.reports_directory, page.env.name, render.key(page.report))
    for _, one in zip(range(MOST_REPORTS), reports, strict=False):
        for row in one.rows(TABLE):
            try:
                found[row[0]].insert(0, (one.started, float(row[1]), row[2]))
            except (IndexError, ValueError):
                continue
    return found


def judge_trends(page: Page, figures: Sequence[Figure]) -> str:
    """Each figure with those before; what will be full soon, if it goes on like that, warns."""
    before, now = past(page), datetime.now(UTC)
    page.report.table(TABLE, COLUMNS, [(one.name, repr(one.value), one.shown, one.limit or "") for one in figures])
    soon, told = list[str](), list[str]()
    for one in figures:
        series = [*before.get(one.name, []), (now, one.value, one.shown)]
        if len(series) == 1:
            continue
        lines = [Bar(f"{at:%Y-%m-%d %H:%M}", (value,), shown) for at, value, shown in series]
        page.report.attach(Evidence(f"Trend: {one.name}", svg=bars(lines)))
        told.append(f"{one.name} {series[-2][2]} → {one.shown}")
        left = days_until(series, one.limit)
        if left is not None and left <= SOON_DAYS:
            soon.append(f"{one.name} in about {left:.0f} days")
    if not figures:
        page.not_measured("trends", "no figure could be read today", "see what is said of the servers")
    elif not told:
        page.not_measured("trends", "there is no earlier report", "they begin with the next month's")
    else:
        value = "; ".join(soon) or f"nothing within {SOON_DAYS} days"
        hint = "make room, or order more, before that day"
        page.report.prefer("what will be full soon", not soon, hint, value=value)
    return "; ".join(told) or "none yet"


def days_until(series: Series, limit: float) -> float | None:
    """When a straight line through the points (least squares) reaches the limit; None where it does not, or nobody can
    say: points of less than a day."""
    if not limit or len(series) < 2:
        return None
    origin = series[-1][0]
    points = [((at - origin).total_seconds() / DAY_SECONDS, value) for at, value, _ in series]
    if points[-1][0] - points[0][0] < 1:
        return None
    x_mean, y_mean = (sum(part) / len(points) for part in zip(*points, strict=True))
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    return max((limit - series[-1][1]) / slope, 0.0) if slope > 0 else None
