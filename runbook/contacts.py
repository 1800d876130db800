"""Whom to call, in every report that is CRITICAL: who reads it at night must not have to look for a number."""

from __future__ import annotations

from prefect.context import FlowRunContext

from runbook.log import logger
from runbook.report import Report, Status
from runbook.target import Target

TABLE = "誰に連絡するか"


def add_contacts(report: Report, target: Target) -> None:
    """Where it is CRITICAL: the owner's own contacts first (a run has its deployment's tags), then everybody, then
    vendors with their support plans."""
    if report.status is not Status.CRITICAL:
        return
    context = FlowRunContext.get()
    tags = context.flow_run.tags if context and context.flow_run else []
    try:  # a report without numbers is a report
        columns, *rows = target.whom_to_call(tags) or [()]
    except Exception as error:
        logger().warning("whom to call is not in the report: %s", type(error).__name__)
        return
    if rows:
        report.table(TABLE, columns, rows)
