"""What the flows of this chapter have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status


@contextlib.contextmanager
def told(report: Report, what: str, otherwise: Status = Status.CRITICAL) -> Iterator[None]:
    """What cannot be looked at is a finding, and the flow goes on with the rest."""
    try:
        yield
    except RunbookFailed:
        raise
    except OpsError as error:
        hint = error.hint or "correct that, then launch it again"
        report.fail(what, hint, value=f"not known: {error.message}", worst=otherwise)
