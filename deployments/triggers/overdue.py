"""Runs of the maintenance table (§7.1) that take over twice as long as they should, or do not begin."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from deployments.maintenance import Planned, Table, name_in, read_table, seconds_of
from deployments.triggers.launch import deployed, launch

TIMES = 2
LATE_SECONDS = 600
"""Beyond the 15 s after which Prefect itself calls a run Late: a worker that is restarted takes a minute."""
FLOW = "escalate"


def _states(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


ENDED = _states("Completed", "Failed", "Crashed", "Cancelling", "Cancelled", "TimedOut")
# What waits for people (a checklist's form) is not running; Prefect tells when it goes on.
NOT_RUNNING = ENDED | _states("Suspended", "Paused", "AwaitingRetry")
WAITS = _states("Late", "Pending", "AwaitingConcurrencySlot")
BEGUN = ENDED | _states("Running", "Suspended", "Paused")


def automations(
    client: SyncPrefectClient, environment: str, table: Table | None = None, late_seconds: float = LATE_SECONDS
) -> list[AutomationCore]:
    """For each row one that fires when it takes too long, for each owner one that fires when something does not begin.

    Raises:
        OpsError: a deployment of the table, or escalate, is not there.
    """
    rows, by_owner = (table or read_table()).planned(), dict[str, list[Planned]]()
    ids = {
        one: deployed(client, environment, one, name_in(environment, one)) for row in rows for one in row.deployments
    }
    for row in rows:
        by_owner.setdefault(row.owner, []).append(row)
    escalation = launch(client, environment, FLOW, {})
    return [
        *(_too_long(escalation, environment, row, [ids[one] for one in row.deployments]) for row in rows),
        *(_not_begun(escalation, environment, owner, [ids[one] for row in its for one in row.deployments], late_seconds)
          for owner, its in by_owner.items()),
    ]  # fmt: skip


def _too_long(escalation: RunDeployment, environment: str, row: Planned, ids: Sequence[UUID]) -> AutomationCore:
    within = TIMES * seconds_of(row.duration)
    name = f"overdue-{row.deployments[0].replace('/', '-')}-{environment}"
    what = f"{{{{ flow_run.name }}}} ({row.task}, {row.duration}) has not ended after twice that time"
    return AutomationCore(
        name=name,
        description=f"{row.task}: 所要{row.duration}の2倍を過ぎても終わらない run をエスカレーションする",
        trigger=_absent(ids, _states("Running"), NOT_RUNNING, within),
        actions=[_escalate(escalation, row.owner, what, "overdue")],
    )


def _not_begun(
    escalation: RunDeployment, environment: str, owner: str, ids: Sequence[UUID], seconds: float
) -> AutomationCore:
    minutes = f"{seconds / 60:.0f} min"
    what = f"{{{{ flow_run.name }}}} was to begin, and has not after {minutes}: look at the worker of {environment}"
    return AutomationCore(
        name=f"not-started-{owner}-{environment}",
        description=f"{owner}: 予定の時刻を過ぎても始まらない run をエスカレーションする",
        trigger=_absent(ids, WAITS, BEGUN, seconds),
        actions=[_escalate(escalation, owner, what, "not-started")],
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
