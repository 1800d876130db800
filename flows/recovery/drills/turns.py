"""scenario=next: the scenario after that of the last drill, by the reports."""

from __future__ import annotations

from collections.abc import Mapping

from blocks.environment import Environment
from flows.recovery.drills.scenario import Scenario
from flows.recovery.drills.summary import MEASURED
from runbook.errors import OpsError
from runbook.page import render
from runbook.report import Report
from tasks.reports.past import filed


def choose(report: Report, env: Environment, scenarios: Mapping[str, Scenario]) -> str:
    """The next scenario that this environment supports, pinned for the plan's form.

    Raises:
        OpsError: it supports none.
    """
    last = last_held(env, render.key(report), scenarios)
    names = list(scenarios)
    begin = names.index(last) + 1 if last else 0
    cannot = {name: missing for name, one in scenarios.items() if (missing := [n for n in one.needs if not env.has(n)])}
    for name in (*names[begin:], *names[:begin]):
        if name not in cannot:
            report.fact("next scenario", f"{name}, after {last or 'none yet'}")
            report.pin("scenario", name)
            if cannot:
                report.fact(
                    "not possible here", "; ".join(f"{one}: no {', '.join(why)}" for one, why in cannot.items())
                )
            return name
    raise OpsError(f"{env.name} supports no scenario", "add [standby] or [endpoint] to its TOML")


def last_held(env: Environment, key: str, scenarios: Mapping[str, Scenario]) -> str:
    """The scenario of the newest drill that broke something; "" if there was none."""
    for one in filed(env.reports_directory, env.name, key):
        name = dict(row[:2] for row in one.rows(MEASURED) if len(row) >= 2).get("scenario", "")
        if name in scenarios:
            return str(name)
    return ""
