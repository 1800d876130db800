"""Who cancelled this run, as far as Prefect knows it."""

from __future__ import annotations

from prefect.client.orchestration import get_client

from runbook.guard.brief import asked_briefly
from runbook.guard.carried_out import current_run

STOPPED = "ended by SIGTERM: its worker or host is being stopped, or a recovery outranks it"
ANSWER_SECONDS = 3.0


def cancelled_by() -> str:
    """`cancelled in Prefect: <the message of the state>`, or that another process ended it. Prefect records who
    cancelled a run only where that program says it."""
    run = current_run()
    if run is None:
        return STOPPED
    try:
        with asked_briefly(ANSWER_SECONDS, retries=1), get_client(sync_client=True) as client:
            state = client.read_flow_run(run.id).state
    except Exception as error:  # the run ends: nothing here may hide what it says
        return f"ended by SIGTERM; Prefect does not say by whom ({type(error).__name__})"
    if state is None or not (state.is_cancelling() or state.is_cancelled()):
        return STOPPED
    return f"cancelled in Prefect: {state.message}" if state.message else "cancelled in Prefect"
