"""The runbooks: one folder per chapter of the manual, one file per procedure."""

from runbook.guard import approval


def _page(environment: str, what: str, run: str, key: str) -> None:
    """Page people about an emergency override (付録C). The import is local because `escalate` is a flow itself."""
    from flows.monitoring.escalation import escalate

    escalate.fn(environment, severity="severe", what=what, owner="SRE", run=run, key=key)


approval.page_by(_page)
