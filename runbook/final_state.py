"""The final state of a run in Prefect: Planned, Warning or Completed, with the headline as its message.

A CRITICAL run raises, and is Failed. The type stays COMPLETED, and Prefect's own Completed comes first: automations
that wait for the end of a run see it. The list of runs filters by the name.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.states import Completed

from runbook.guard.brief import asked_briefly
from runbook.log import logger
from runbook.report import Report, Status

NAMES = {Status.PLANNED: "Planned", Status.WARN: "Warning", Status.OK: "Completed"}
MOST_CHARACTERS = 1000


def name_final_state() -> None:
    """Name the final state of this flow run by the report that its flow returns."""
    context = FlowRunContext.get()
    if context and context.flow and _set not in context.flow.on_completion_hooks:
        context.flow.on_completion(_set)


def _set(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    report = state.result(raise_on_failure=False)
    if not isinstance(report, Report) or report.status not in NAMES:
        return
    named: State[None] = Completed(name=NAMES[report.status], message=report.sentence()[:MOST_CHARACTERS])
    try:
        with asked_briefly(retries=2), get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, named, force=True)  # from one final state to another
    except Exception as error:  # the run is Completed all the same
        logger().warning("the run's state could not be named in Prefect: %s", error)
