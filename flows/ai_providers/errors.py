"""Errors of one part of a check as findings, so that the other parts still run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status


@contextlib.contextmanager
def report_errors(report: Report, what: str, worst: Status = Status.CRITICAL) -> Iterator[None]:
    """Record an error inside the block as the finding `what`: “not known”, with the status `worst`."""
    try:
        yield
    except RunbookFailed:
        raise
    except OpsError as error:
        hint = error.hint or "fix this error, then run this again"
        report.fail(what, hint, value=f"not known: {error.message}", worst=worst)
