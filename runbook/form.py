"""Links to other runbooks' forms, filled in: what a diagnosis ends with."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_UI_URL

from runbook.render import dumps


def form_of(flow: str, environment: str, parameters: Mapping[str, object]) -> str:
    """The address of a deployment's form with these parameters in it; "" outside of Prefect, or where it is not
    deployed: `in_words` says it then."""
    ui = PREFECT_UI_URL.value()
    if FlowRunContext.get() is None or not ui:
        return ""
    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{flow}/{environment}")
    except (ObjectNotFound, httpx.HTTPError):
        return ""
    query = urllib.parse.urlencode({"parameters": dumps({"environment": environment, **parameters})})
    return f"{ui}/deployments/deployment/{deployment.id}/run?{query}"


def in_words(flow: str, parameters: Mapping[str, object]) -> str:
    """The same for somebody who fills it in: `restore-to-point with by="lsn", target="0/3000060"`."""
    return f"{flow} with {', '.join(f'{name}={dumps(value)}' for name, value in parameters.items())}"


def linked(flow: str, environment: str, parameters: Mapping[str, object], title: str) -> str:
    """One of the two, as Markdown."""
    address = form_of(flow, environment, parameters)
    return f"[{title}]({address})" if address else f"{title}: `{in_words(flow, parameters)}`"
