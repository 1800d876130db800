"""The scheduled run that continues an incident when its next level is due: no process sleeps."""

from __future__ import annotations

from datetime import datetime

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Scheduled

from runbook.guard.brief import asked_briefly
from runbook.kinds import action

FLOW = "escalate"


@action(idempotent=True)
def schedule_next(environment: str, incident: str, due: datetime) -> bool:
    """Schedule a run of `escalate`, once for each time; False: Prefect does not accept it."""
    if FlowRunContext.get() is None:
        return False
    try:
        with asked_briefly(retries=2), get_client(sync_client=True) as client:  # the next notification must not wait
            deployment = client.read_deployment_by_name(f"{FLOW}/{environment}")
            client.create_flow_run_from_deployment(
                deployment.id,
                parameters={"environment": environment},
                state=Scheduled(scheduled_time=due),
                name=f"{FLOW} {environment} {incident}",
                idempotency_key=f"{FLOW}-{incident}-{due.isoformat()}",
            )
    except (httpx.HTTPError, PrefectException):
        return False
    return True
