"""Runs that wait for people, as Prefect tells of them; and telling the people whose turn it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.page.address import ui_address
from tasks.prefect.client import prefect_client

PAGE = 200
ESCALATE = "escalate"


@dataclass(frozen=True)
class WaitingRun:
    """A run that is suspended: when it began first, since when it waits for its present answer, and under which key."""

    id: str
    name: str
    parameters: Mapping[str, Any]
    began: datetime
    since: datetime
    key: str

    @property
    def link(self) -> str:
        """Of its page, where its form is; the run's id where nobody knows the address of the UI."""
        return ui_address(f"runs/flow-run/{self.id}") or f"run {self.id}"


@probe
def find_waiting(environment: str, flow: str) -> list[WaitingRun]:
    """The suspended runs of a flow in an environment, of whichever of its deployments (each checklist that is scheduled
    has one of its own), the longest waiting first.

    Raises:
        Unreachable: Prefect does not answer.
    """
    found = list[FlowRun]()
    with prefect_client() as client:
        while page := client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
            ),
            limit=PAGE,
            offset=len(found),
        ):
            found += page
    own = [run for run in found if run.parameters.get("environment") == environment]
    return sorted((_waiting(run) for run in own), key=lambda one: one.since)


def _waiting(run: FlowRun) -> WaitingRun:
    state = run.state
    assert state  # it was asked for by its state
    began = run.start_time or run.expected_start_time or state.timestamp
    key = state.state_details.pause_key or ""
    return WaitingRun(str(run.id), run.name, run.parameters, began, state.timestamp, key)


@dataclass(frozen=True)
class Input:
    """What was sent to a run that waited, or what it asked with."""

    key: str
    value: Any
    at: datetime


def read_inputs(run: str, prefix: str) -> list[Input]:
    """The inputs of a run by the beginning of their keys, the oldest first. A run that waits asks before it has a
    report: this is no step of one.

    Raises:
        Unreachable: Prefect does not answer.
        OpsError: `run` is no id.
    """
    try:
        path = {"id": UUID(run)}
    except ValueError:
        raise OpsError(f"“{run[:40]}” is no id of a run", "copy it from the run's page") from None
    wanted = {"prefix": prefix, "limit": PAGE}  # without a limit Prefect gives one
    with prefect_client() as client:
        found = client.request("POST", "/flow_runs/{id}/input/filter", path_params=path, json=wanted).json()
    inputs = [Input(one["key"], json.loads(one["value"]), datetime.fromisoformat(one["created"])) for one in found]
    return sorted(inputs, key=lambda one: one.at)


@action(idempotent=True)
def launch_escalation(
    environment: str, *, what: str, owner: str, run: str, key: str, once: str, severity: str = "normal"
) -> str:
    """Launch `escalate` for what somebody must do; the launched run's id. The same `once` launches it once only, the
    same `key` is the same incident.

    Raises:
        Unreachable: Prefect does not answer.
        OpsError: escalate is not deployed for the environment.
    """
    given = {"environment": environment, "severity": severity, "what": what, "owner": owner, "run": run, "key": key}
    with prefect_client() as client:
        try:
            deployment = client.read_deployment_by_name(f"{ESCALATE}/{environment}")
        except ObjectNotFound:
            raise OpsError(
                f"{ESCALATE} is not deployed for {environment}: nobody is notified",
                f"notify them yourself, then: python -m deployments.deploy --environment {environment}",
            ) from None
        launched = client.create_flow_run_from_deployment(deployment.id, parameters=given, idempotency_key=once)
    return str(launched.id)
