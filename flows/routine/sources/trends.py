"""Figures over the past months: a table in each report, read back from the earlier reports, drawn and extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from flows.routine.page import Page
from runbook.page import render
from runbook.page.plots import Trace, traces
from runbook.report import Evidence
from runbook.units import duration
from tasks.reports.frames import durations, slope_per_day, tables
from tasks.reports.past import filed

if TYPE_CHECKING:
    from pandas import DataFrame

TABLE = "Figures"
COLUMNS = ("figure", "value", "shown", "limit")
MOST_REPORTS, SOON_DAYS = 24, 90
TIMED = ("backup-database", "backup-redis", "backup-files", "backup-cluster", "replicate-backups", "verify-backup")
"""Runbooks whose duration grows with the data."""
TIMED_DAYS = 31


@dataclass(frozen=True)
class Figure:
    """A number of today. `unit`: as in runbook/page/plots.py; `limit`: the value at which it is full, or 0."""

    name: str
    value: float
    shown: str
    limit: float = 0.0
    unit: str = ""


def history(page: Page, figures: Sequence[Figure]) -> DataFrame:
    """`figure`, `began`, `value` and `shown` of the earlier reports of this runbook and of `figures`, oldest first."""
    import pandas as pd

    reports = filed(page.env.reports_directory, page.env.name, render.key(page.report))
    past = tables(islice(reports, MOST_REPORTS), TABLE, columns=COLUMNS).reindex(
        columns=["figure", "began", "value", "shown"]
    )
    past["value"] = pd.to_numeric(past["value"], errors="coerce")
    today = (
        pd.DataFrame([vars(one) for one in figures]).rename(columns={"name": "figure"}).assign(began=datetime.now(UTC))
    )
    frames = [one for one in (past.dropna(), today.reindex(columns=past.columns)) if len(one)]
    return pd.concat(frames, ignore_index=True) if frames else past


def judge_trends(page: Page, figures: Sequence[Figure]) -> str:
    """Each figure with its earlier values. One that reaches its limit within 90 days is a WARN."""
    if not figures:
        page.not_measured("trends", "no figure could be read", "fix the findings about the servers")
        return "none yet"
    found = history(page, figures)
    rows = [(one.name, repr(one.value), one.shown, one.limit or "") for one in figures]
    page.report.table(TABLE, COLUMNS, rows, csv=found.to_csv(index=False))
    drawn, soon, changes = list[Trace](), list[str](), list[str]()
    for one in figures:
        series = found[found["figure"] == one.name]
        if len(series) < 2:
            continue
        points = list(zip(series["began"].dt.to_pydatetime(), series["value"], strict=True))
        drawn.append(Trace(one.name, points, one.shown, one.unit, one.limit or None))
        changes.append(f"{one.name} {series['shown'].iloc[-2]} → {one.shown}")
        left = days_until(series, one.limit)
        if left is not None and left <= SOON_DAYS:
            soon.append(f"{one.name} in about {left:.0f} days")
    if not drawn:
        page.not_measured("trends", "there is no earlier report", "the next report has them")
        return "none yet"
    page.report.attach(Evidence("Trends (dashed: full)", svg=traces(drawn, page.env.zone)))
    page.report.prefer(
        "figures below their limits",
        not soon,
        "free or add capacity before that day",
        value="; ".join(soon) or f"no limit is reached within {SOON_DAYS} days",
    )
    return "; ".join(changes)


def days_until(series: DataFrame, limit: float) -> float | None:
    """Days until the values of `series` (`began`, `value`) reach `limit` by least squares; None: they do not, or all
    were measured within a day."""
    slope = slope_per_day(series["began"], series["value"]) if limit else 0.0
    return max((limit - float(series["value"].iloc[-1])) / slope, 0.0) if slope > 0 else None


def show_durations(page: Page) -> None:
    """How long backups and their verifications took in the last month: a table with percentiles, and the curves."""
    since = datetime.now(UTC) - timedelta(days=TIMED_DAYS)
    reports = [
        one
        for runbook in TIMED
        for one in filed(page.env.reports_directory, page.env.name, runbook, since=since)
        if one.status != "PLANNED"
    ]
    found = durations(reports)
    good = found[found["status"] != "CRITICAL"]
    if good.empty:
        return
    rows, drawn = list[tuple[object, ...]](), list[Trace]()
    for runbook, runs in good.groupby("runbook"):
        seconds = runs["seconds"]
        p50, p95 = seconds.quantile([0.5, 0.95])
        growth = slope_per_day(runs["began"], seconds) * 30
        texts = [duration(one) for one in (p50, p95, seconds.max(), seconds.iloc[-1])]
        failed = int((found["runbook"].eq(runbook) & found["status"].eq("CRITICAL")).sum())
        rows.append((runbook, len(runs), failed, *texts, f"{growth:+.1f} s"))
        points = list(zip(runs["began"].dt.to_pydatetime(), seconds, strict=True))
        drawn.append(Trace(str(runbook), points, texts[-1], "s"))
    name = f"Durations of backups and verifications, {TIMED_DAYS} days"
    columns = ("runbook", "succeeded", "failed", "p50", "p95", "longest", "last", "growth a month")
    page.report.table(name, columns, rows, csv=found.to_csv(index=False))
    page.report.attach(Evidence(f"{name}, as curves", svg=traces(drawn, page.env.zone)))
