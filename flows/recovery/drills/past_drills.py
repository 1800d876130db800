"""Earlier drills, from their reports: the trend, and the scenario that is next."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from blocks.environment import Environment
from flows.recovery.drills.scenario import Scenario
from flows.recovery.drills.summary import MEASURED
from runbook.errors import OpsError
from runbook.page import render
from runbook.report import Evidence, Report, Status, StepTime
from tasks.reports.past import Filed, filed

MOST = 20
_ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)
COLUMNS = ("began", "scenario", "status", "RTO (s)", "lost writes", "RPO (s)", *(f"phase {n} (s)" for n in range(1, 7)))
_MEASURES = ("rto_seconds", "lost_writes", "rpo_seconds", *(f"phase_{n}_seconds" for n in range(1, 7)))


def report_trend(report: Report, directory: Path, scenario: str) -> None:
    """The newest drills of every scenario, and the best and the last RTO of this one."""
    newest = islice(filed(directory, report.environment, render.key(report)), MOST)
    past = [row for row in map(_row, newest) if row][::-1]  # the oldest first
    report.table("Trend: earlier drills", COLUMNS, past)
    if drawn := [row for row in past if row[3]]:
        picture = render.bars([_bar(row) for row in drawn], _ORIGIN)
        report.attach(Evidence("RTO of earlier drills", svg=picture))
    same = [float(row[3]) for row in past if row[1] == scenario and row[3] and row[2] != "CRITICAL"]
    if same:
        report.fact("RTO of earlier drills", f"best {min(same):.1f} s, last {same[-1]:.1f} s, of {len(same)}")


def _bar(row: tuple[str, ...]) -> StepTime:
    """Its length is the RTO."""
    status = Status.CRITICAL if row[2] == "CRITICAL" else Status.OK
    return StepTime(f"{row[0]} {row[1]}", _ORIGIN, float(row[3]), status)


def _row(one: Filed) -> tuple[str, ...] | None:
    """None if it measured nothing: a plan, a refusal, a drill that was healed."""
    measured = measured_in(one)
    if "scenario" not in measured:
        return None
    begun = str(one.content["started"])[:16].replace("T", " ")
    return (begun, measured["scenario"], one.status, *(str(measured.get(name, "")) for name in _MEASURES))


def measured_in(one: Filed) -> dict[str, str]:
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
