"""Which runs are held for dead."""

from __future__ import annotations

from typing import cast

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import EventTrigger

from deployments.triggers import deaths, failures, overdue


def test_a_run_that_waits_for_people_is_not_held_for_dead() -> None:
    """A suspended run has no process, and sends no heartbeat for days: only one that should is marked Crashed."""
    (zombies,) = deaths.automations(cast(SyncPrefectClient, None), "lab")
    trigger = cast(EventTrigger, zombies.trigger)
    assert {"prefect.flow-run.Suspended", "prefect.flow-run.Paused"} <= trigger.expect
    assert trigger.after == {deaths.HEARTBEAT}, "its heartbeats begin anew when somebody has answered"


def test_a_run_that_ends_planned_or_with_a_warning_has_ended() -> None:
    """Automations wait for events, which are named after states."""
    named = {"prefect.flow-run.Planned", "prefect.flow-run.Warning", "prefect.flow-run.Completed"}
    for waited_for in (deaths.ENDED, failures.BEGAN, overdue.ENDED, overdue.NOT_RUNNING, overdue.BEGUN):
        assert named <= waited_for
    assert named.isdisjoint(failures.FAILED)
