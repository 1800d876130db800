"""The flow run of an alert, from Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_UI_URL

from runbook.errors import excerpt
from runbook.guard.brief import asked_briefly
from runbook.kinds import probe
from runbook.page.markdown import plain


@dataclass(frozen=True)
class AlertCause:
    """A flow run: name, state, the sentence of its report with the next step, tags, address."""

    name: str = ""
    state: str = ""
    message: str = ""
    sentence: str = ""
    tags: tuple[str, ...] = ()
    address: str = ""


@probe
def read_cause(run: str) -> AlertCause:
    """The run; empty if Prefect does not answer or does not know it: the alert is sent without it."""
    if not run or FlowRunContext.get() is None:
        return AlertCause()
    address = f"{ui}/runs/flow-run/{run}" if (ui := PREFECT_UI_URL.value()) else ""
    try:
        wanted = UUID(run)
        with asked_briefly(), get_client(sync_client=True) as client:
            found = client.read_flow_run(wanted)
            shown = client.read_artifacts(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[wanted])))
    except (ValueError, httpx.HTTPError, PrefectException):
        return AlertCause(address=address)
    told = [plain(one.description) for one in shown if one.type == "markdown" and one.description]
    state = found.state
    return AlertCause(
        found.name,
        state.name or "" if state else "",
        excerpt(state.message or "", 200) if state else "",
        excerpt(told[-1], 300) if told else "",
        tuple(found.tags),
        address,
    )
