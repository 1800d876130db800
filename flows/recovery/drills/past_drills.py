"""Earlier drills, from their reports: the trend, and the scenario that is next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.environment import Environment
from flows.recovery.drills.scenario import Scenario
from flows.recovery.drills.summary import MEASURED
from runbook.errors import OpsError
from runbook.page import render
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from tasks.reports.frames import tables
from tasks.reports.past import FiledReport, filed

if TYPE_CHECKING:
    from pandas import DataFrame

MOST = 20
RTO = "RTO (s)"
COLUMNS = ("began", "scenario", "status", RTO, "lost writes", "RPO (s)", *(f"phase {n} (s)" for n in range(1, 7)))
_MEASURES = ("rto_seconds", "lost_writes", "rpo_seconds", *(f"phase_{n}_seconds" for n in range(1, 7)))


def report_trend(report: Report, directory: Path, scenario: str) -> None:
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


def _measured(reports: Iterable[FiledReport]) -> DataFrame:
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


def measured_in(one: FiledReport) -> dict[str, str]:
    """The figures of a drill's report."""
    return {row[0]: str(row[1]) for row in one.rows(MEASURED) if len(row) == 2}


def next_scenario(report: Report, env: Environment, scenarios: Mapping[str, Scenario]) -> str:
    """The scenario after that of the last drill, among those that the environment supports; pinned for the plan's form.

    Raises:
        OpsError: it supports none.
    """
    held = (measured_in(one).get("scenario", "") for one in filed(env.reports_directory, env.name, render.key(report)))
    last, names = next((name for name in held if name in scenarios), ""), list(scenarios)
    begin = names.index(last) + 1 if last else 0
    cannot = {name: missing for name, one in scenarios.items() if (missing := [n for n in one.needs if not env.has(n)])}
    chosen = next((name for name in (*names[begin:], *names[:begin]) if name not in cannot), "")
    if not chosen:
        raise OpsError(f"{env.name} supports no scenario", "add [standby] or [endpoint] to its TOML")
    report.fact("next scenario", f"{chosen}, after {last or 'none yet'}")
    report.pin("scenario", chosen)
    if cannot:
        report.fact("not possible here", "; ".join(f"{one}: no {', '.join(why)}" for one, why in cannot.items()))
    return chosen
