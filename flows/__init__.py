"""In what order, and with what judgement: one folder per chapter of the manual, one file per topic."""

from runbook.guard import approval


def _page(environment: str, what: str, run: str, key: str) -> None:
    """An emergency override calls people (付録C). Imported here only: it is a flow itself."""
    from flows.monitoring.escalation import escalate

    escalate.fn(environment, severity="severe", what=what, owner="SRE", run=run, key=key)


approval.page_by(_page)
