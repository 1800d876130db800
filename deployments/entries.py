"""Entries of prefect.yaml, sent to Prefect's API as its own `prefect deploy` does, in fewer requests.

Prefect's command makes six requests for each entry, one after another, and reads its block references each time. Here
an entry costs one request, which is sent while the next flow is imported. Two at a time: the server reads one while it
writes the other. More would be slower, since SQLite writes one at a time.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, RRuleSchedule
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.utilities.callables import parameter_schema

from deployments import forms
from runbook.errors import OpsError, Unreachable
from runbook.guard.brief import BUSY_SECONDS, busy, impatient_client, patience
from runbook.language.say import Language
from runbook.wait import until

CORRECT = "correct its entry in prefect.yaml, then run this again"
PAGE = 200
SENDERS = 2
_AS_WRITTEN = ("description", "version", "tags", "entrypoint", "parameters")


def publish(
    entries: Sequence[Mapping[str, Any]],
    pull: Sequence[Mapping[str, Any]],
    known: Mapping[str, DeploymentResponse],
    language: Language,
) -> None:
    """Create or update a deployment for each entry, whose placeholders are filled in. `pull`: the steps before a run;
    `known`: what Prefect has already, by flow and name (`daily-check/production`); `language`: of the fields' help.

    Raises:
        OpsError: an entry names no flow, or Prefect refuses it.
    """
    sent: list[Future[None]] = []
    with impatient_client() as client, ThreadPoolExecutor(SENDERS) as pool:
        publisher = _Publisher(client, pull)
        for entry in entries:
            flow = flow_of(entry["entrypoint"])
            schema = parameter_schema(flow).model_dump(exclude_unset=True)
            fields = {"parameter_openapi_schema": forms.schema_in(schema, language)}
            there = known.get(f"{flow.name}/{entry['name']}")
            sent.append(pool.submit(publisher.send, flow.name, entry, fields, there))
            if sent[0].done():  # a refusal ends it before every flow is imported
                sent.pop(0).result()
        for one in sent:
            one.result()


def flow_of(entrypoint: str) -> Flow[..., Any]:
    """The flow of an entrypoint.

    Raises:
        OpsError: there is none.
    """
    module, _, name = entrypoint.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OpsError(f"{entrypoint} cannot be imported: {error}", CORRECT) from error
    if not isinstance(found, Flow):
        raise OpsError(f"{entrypoint} is no flow", CORRECT)
    return found


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """A value of prefect.yaml with its placeholders (`{{ $OPS_ROOT }}`) replaced."""
    if isinstance(value, str):
        for name, word in words.items():
            value = value.replace(f"{{{{ ${name} }}}}", word)
        return value
    if isinstance(value, Mapping):
        return {key: filled(one, words) for key, one in value.items()}
    return [filled(one, words) for one in value] if isinstance(value, list) else value


class _Publisher:
    """Sends entries; creates each flow once."""

    def __init__(self, client: SyncPrefectClient, pull: Sequence[Mapping[str, Any]]) -> None:
        self._client = client
        self._pull = [dict(step) for step in pull]
        self._flows: dict[str, UUID] = {}
        # Those that another environment's deployment made.
        while page := client.read_flows(limit=PAGE, offset=len(self._flows)):
            self._flows |= {flow.name: flow.id for flow in page}

    def send(
        self, flow: str, entry: Mapping[str, Any], fields: Mapping[str, Any], there: DeploymentResponse | None
    ) -> None:
        schedules = [schedule_of(one) for one in entry["schedules"]] if "schedules" in entry else None
        told = {
            **fields,
            **{name: entry[name] for name in _AS_WRITTEN},
            "paused": entry.get("paused", False),
            "work_pool_name": entry["work_pool"]["name"],
            "job_variables": entry["work_pool"].get("job_variables", {}),
            "pull_steps": self._pull,
        }

        def work() -> None:
            if there:
                self._update(there, told, schedules)
            else:
                self._client.create_deployment(
                    flow_id=self._flow(flow),
                    name=entry["name"],
                    schedules=schedules or [],
                    enforce_parameter_schema=True,
                    **told,
                )

        _insist(work, f"{flow}/{entry['name']}")

    def _update(
        self, there: DeploymentResponse, told: dict[str, Any], schedules: list[DeploymentScheduleCreate] | None
    ) -> None:
        if schedules is not None:
            told["schedules"] = [one.model_dump(mode="json", exclude_unset=True) for one in schedules]
            # Those with slugs, as another client makes them, are matched by slug; the entry replaces all.
            for one in there.schedules if all(one.slug for one in there.schedules) else ():
                with contextlib.suppress(ObjectNotFound):
                    self._client.delete_deployment_schedule(there.id, one.id)
        self._client.update_deployment(there.id, DeploymentUpdate(**told))

    def _flow(self, name: str) -> UUID:
        if name not in self._flows:
            self._flows[name] = self._client.create_flow_from_name(name)
        return self._flows[name]


def schedule_of(described: Mapping[str, Any]) -> DeploymentScheduleCreate:
    """A schedule of prefect.yaml: `cron` or `rrule`, `timezone`, and `active`, `parameters` where they are stated."""
    zone = described["timezone"]
    schedule = (
        CronSchedule(cron=described["cron"], timezone=zone)
        if "cron" in described
        else RRuleSchedule(rrule=described["rrule"], timezone=zone)
    )
    more = {name: described[name] for name in ("active", "parameters") if name in described}
    return DeploymentScheduleCreate(schedule=schedule, **more)


def _insist(work: Callable[[], object], name: str) -> None:
    """Send a request until Prefect answers: one with SQLite that is busy says so at once.

    Raises:
        OpsError: Prefect refused it, or stayed busy.
    """

    def once() -> bool:
        try:
            work()
        except PrefectHTTPStatusError as error:
            if error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                raise busy(error) from None
            raise OpsError(f"Prefect refused {name}: {error.response.text[:300]}", CORRECT) from error
        except httpx.TransportError as error:
            raise Unreachable(f"Prefect does not answer ({type(error).__name__})") from None
        return True

    with patience(0):
        until(once, what=f"Prefect's answer about {name}", seconds=BUSY_SECONDS, hint="run this again")
