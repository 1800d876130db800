"""Events about metrics, for Prefect's automations (https://docs.prefect.io/v3/concepts/events)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from runbook.kinds import action

PREFIX = "ops.metric"
ANSWER_SECONDS = 10.0
AT_ONCE = 50


def event(kind: str, payload: Mapping[str, Any], at: datetime, *, again: bool = False) -> dict[str, Any]:
    """`ops.metric.exceeded` or `ops.metric.recovered`, of the resource `ops.metric.<environment>.<metric>`. Automations
    distinguish by its labels a measured value from a missing one, and a repeated event (`again`)."""
    environment, metric = payload["environment"], payload["metric"]
    return {
        "id": str(uuid.uuid4()),
        "occurred": at.isoformat(),
        "event": f"{PREFIX}.{kind}",
        "resource": {
            "prefect.resource.id": f"{PREFIX}.{environment}.{metric}",
            "prefect.resource.name": metric,
            f"{PREFIX}.environment": environment,
            f"{PREFIX}.measured": "no" if payload["value"] is None else "yes",
            f"{PREFIX}.again": "yes" if again else "no",
            f"{PREFIX}.elsewhere": "yes" if "@" in metric else "no",
        },
        "payload": dict(payload),
    }


def watching(environment: str, at: datetime) -> dict[str, Any]:
    """The heartbeat of the watcher (`ops.metric.watching`): Prefect escalates a missing one."""
    return event("watching", {"environment": environment, "metric": "watching", "value": 0.0}, at)


@action(idempotent=True)
def send(events: Sequence[Mapping[str, Any]]) -> str:
    """Send events to Prefect, which ignores an id that it has. Returns "", or why they were not accepted."""
    if not PREFECT_API_URL.value():
        return "PREFECT_API_URL is not set"
    try:
        settings = {"timeout": ANSWER_SECONDS}
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings=settings) as client,
        ):
            for first in range(0, len(events), AT_ONCE):
                client.request("POST", "/events", json=list(events[first : first + AT_ONCE])).raise_for_status()
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        return f"Prefect did not accept them ({type(error).__name__})"
    return ""
