"""The report's lines about the live application: health and smoke checks, or that none is configured."""

from __future__ import annotations

from runbook.report import Report
from tasks.application.health import Health, SmokeResult


def report_health(report: Report, health: Health) -> None:
    """A check that is not configured is a fact, not a finding."""
    if health.configured:
        report.passed("health", value=health.answer)
    else:
        report.fact("health", health.answer)


def report_smoke(report: Report, result: SmokeResult) -> None:
    """Each smoke check, and whether all passed."""
    if not result.configured:
        report.fact("smoke checks", result.detail)
        return
    report.table("Application", ("check", "works", "seconds", "detail"), result.rows)
    report.require("application works", result.ok, "look at the backend's log", value=result.detail)
