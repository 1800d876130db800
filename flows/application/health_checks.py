"""Findings about the live application: its health check and its smoke checks."""

from __future__ import annotations

from runbook.report import Report
from tasks.application.health import Health, SmokeResult


def report_health(report: Report, health: Health) -> None:
    """The health check's answer; a missing configuration is a fact, not a finding."""
    if health.configured:
        report.passed("health", value=health.answer)
    else:
        report.fact("health", health.answer)


def report_smoke(report: Report, result: SmokeResult) -> None:
    """A table of the smoke checks, and whether all passed."""
    if not result.configured:
        report.fact("smoke checks", result.detail)
        return
    report.table("Application", ("check", "works", "seconds", "detail"), result.rows)
    report.require("application works", result.ok, "check the backend's log", value=result.detail)
