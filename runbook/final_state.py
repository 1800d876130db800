"""The final state of a run in Prefect: Planned, Warning or Completed, with the headline as its message.

The type stays COMPLETED; a CRITICAL run raises, and is Failed. The list of runs filters by the name. Prefect makes the
state of what a flow returns, and a flow returns its report, also to another flow that calls it: so the state is named
where Prefect makes it. Where a version of Prefect makes it elsewhere, every run is Completed, and a test fails.
"""

from __future__ import annotations

from typing import Any

from prefect import flow_engine
from prefect.client.schemas.objects import State

from runbook.report import Report, Status

NAMES = {Status.PLANNED: "Planned", Status.WARN: "Warning", Status.OK: "Completed"}
MOST_CHARACTERS = 1000
_MAKER = "return_value_to_state"
_as_prefect_does = getattr(flow_engine, _MAKER, None)


async def _named(returned: object, *args: Any, **kwargs: Any) -> State[Any]:
    assert _as_prefect_does
    state: State[Any] = await _as_prefect_does(returned, *args, **kwargs)
    if isinstance(returned, Report) and returned.status in NAMES:
        state.name, state.message = NAMES[returned.status], returned.sentence()[:MOST_CHARACTERS]
    return state


def name_final_states() -> None:
    """From here on, in this process."""
    if _as_prefect_does:
        setattr(flow_engine, _MAKER, _named)
