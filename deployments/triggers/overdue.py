"""Runs of the maintenance table (§7.1) that take over twice as long as they should, or were sent off and never began.

Runs that nobody even took, Late ones, are told for all deployments by `failures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from blocks.config import toml
from deployments.maintenance import MaintenanceTable, PlannedWork, entries, name_in, read_table, seconds_of
from deployments.runbooks import has_schedule
from deployments.triggers.launch import deployed, launch
from runbook.flow import NAMES

TIMES = 2
STUCK_SECONDS = 600
"""A worker that takes a run starts its process within seconds; a server that is restarted in between loses it."""
FLOW = "escalate"


def _states(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


ENDED = _states(*NAMES.values(), "Failed", "Crashed", "Cancelling", "Cancelled", "TimedOut")
# What waits for people (a checklist's form) is not running; Prefect tells when it goes on.
NOT_RUNNING = ENDED | _states("Suspended", "Paused", "AwaitingRetry")
SENT = _states("Pending", "AwaitingConcurrencySlot")
BEGUN = ENDED | _states("Running", "Suspended", "Paused")


def automations(
    client: SyncPrefectClient,
    environment: str,
    table: MaintenanceTable | None = None,
    stuck_seconds: float = STUCK_SECONDS,
) -> list[AutomationCore]:
    """For each row one that fires when it takes too long; for all of them one that fires when a run does not begin.
    None where the environment names nobody to tell.

    Raises:
        OpsError: a deployment of the table, or escalate, is not there.
    """
    rows = table.planned() if table else _planned(environment)
    if not rows:
        return []
    ids = {
        one: deployed(client, environment, one, name_in(environment, one)) for row in rows for one in row.deployments
    }
    escalation = launch(client, environment, FLOW, {})
    too_long = [_too_long(escalation, environment, row, [ids[one] for one in row.deployments]) for row in rows]
    return [*too_long, _stuck(escalation, environment, list(ids.values()), stuck_seconds)]


def _planned(name: str) -> list[PlannedWork]:
    """The rows of the maintenance table, with those of their deployments that the environment has."""
    env = toml.environment(name)
    if not env.has("alerts"):
        return []
    there = {one for one, entry in entries().items() if has_schedule(entry, env)}
    rows = [
        replace(row, deployments=tuple(filter(there.__contains__, row.deployments))) for row in read_table().planned()
    ]
    return [row for row in rows if row.deployments]


def _too_long(escalation: RunDeployment, environment: str, row: PlannedWork, ids: Sequence[UUID]) -> AutomationCore:
    within = TIMES * seconds_of(row.duration)
    name = f"overdue-{row.deployments[0].replace('/', '-')}-{environment}"
    what = f"{{{{ flow_run.name }}}} ({row.task}, {row.duration}) has not ended after twice that time"
    return AutomationCore(
        name=name,
        description=f"{row.task}: a run that has not ended after twice {row.duration} is escalated",
        trigger=_absent(ids, _states("Running"), NOT_RUNNING, within),
        actions=[_escalate(escalation, row.owner, what, "overdue")],
    )


def _stuck(escalation: RunDeployment, environment: str, ids: Sequence[UUID], seconds: float) -> AutomationCore:
    what = f"{{{{ flow_run.name }}}} was sent to a worker of {environment} and has not begun since"
    return AutomationCore(
        name=f"stuck-runs-{environment}",
        description="a run that stays Pending is escalated",
        trigger=_absent(ids, SENT, BEGUN, seconds),
        actions=[_escalate(escalation, "SRE", what, "stuck")],
    )


def _absent(ids: Sequence[UUID], after: set[str], expect: set[str], seconds: float) -> EventTrigger:
    """For each run of these deployments: one of `after`, and then none of `expect` for so long."""
    return EventTrigger(
        after=after,
        expect=expect,
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ResourceSpecification(
            {"prefect.resource.role": "deployment", "prefect.resource.id": [f"prefect.deployment.{one}" for one in ids]}
        ),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _escalate(escalation: RunDeployment, owner: str, what: str, kind: str) -> RunDeployment:
    run = "{{ flow_run.id | string }}"
    given = {"what": what, "owner": owner, "run": run, "key": f"{kind}-{run}"}
    return escalation.model_copy(update={"parameters": {**(escalation.parameters or {}), **given}})
