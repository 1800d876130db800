"""Drills before this one, from the reports of the chain."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from flows.recovery.drills.summary import MEASURED
from runbook.page import render
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from tasks.reports.frames import tables
from tasks.reports.past import Filed, filed

if TYPE_CHECKING:
    from pandas import DataFrame

MOST = 20
RTO = "RTO (s)"
COLUMNS = ("began", "scenario", "status", RTO, "lost writes", "RPO (s)", *(f"phase {n} (s)" for n in range(1, 7)))
_MEASURES = ("rto_seconds", "lost_writes", "rpo_seconds", *(f"phase_{n}_seconds" for n in range(1, 7)))


def report_results(report: Report, directory: Path, scenario: str) -> None:
    """The newest ones, of every scenario, and whether this one's RTO became worse."""
    newest = islice(filed(directory, report.environment, render.key(report)), MOST)
    past = _measured(newest)
    rows = past.assign(began=past["began"].dt.strftime("%Y-%m-%d %H:%M")).astype(object).fillna("").to_numpy().tolist()
    report.table("Trend: earlier drills", COLUMNS, rows, csv=past.to_csv(index=False))
    drawn = past[past[RTO].notna()]
    if not drawn.empty:
        lines = [
            Bar(f"{began:%Y-%m-%d %H:%M} {of}", (rto,), f"{rto:.1f} s, {status}")
            for began, of, status, rto in drawn[[*COLUMNS[:4]]].itertuples(index=False)
        ]
        report.attach(Evidence("RTO of earlier drills", svg=bars(lines, "s")))
    same = drawn[(drawn["scenario"] == scenario) & (drawn["status"] != "CRITICAL")][RTO]
    if not same.empty:
        report.fact("RTO of earlier drills", f"best {same.min():.1f} s, last {same.iloc[-1]:.1f} s, of {len(same)}")


def _measured(reports: Iterable[Filed]) -> DataFrame:
    """A row for each drill that measured something, oldest first: plans, refusals and healed drills did not."""
    import pandas as pd

    found = tables(reports, MEASURED)
    if found.empty:
        return pd.DataFrame(columns=list(COLUMNS)).astype({"began": "datetime64[ns, UTC]"})
    once = found.drop_duplicates(["report", "measure"], keep="last")
    wide = once.pivot(index=["began", "status", "report"], columns="measure", values="value").reset_index()
    wide = wide.rename(columns=dict(zip(_MEASURES, COLUMNS[3:], strict=True))).reindex(columns=list(COLUMNS))
    numbers = wide[[*COLUMNS[3:]]].apply(pd.to_numeric, errors="coerce")
    return wide.assign(**numbers).dropna(subset=["scenario"])
