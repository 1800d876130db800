"""diagnose-application: each cause of a real application under a real supervisord is named first."""

from __future__ import annotations

from flows.troubleshooting import application
from runbook.errors import RunbookFailed
from runbook.report import Report


def diagnosed(environment: str) -> Report:
    """Its report, critical or not."""
    try:
        return application.diagnose_application.fn(environment=environment)
    except RunbookFailed as error:
        return error.report
