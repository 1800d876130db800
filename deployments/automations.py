"""Automations, by name and idempotent: registered, listed, removed.

OPS_ENVIRONMENT=staging python -m deployments.automations [list | register | remove]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore

from deployments.triggers import deaths, failures, metrics, overdue
from runbook.errors import OpsError

Causes = Sequence[Callable[[SyncPrefectClient, str], list[AutomationCore]]]
# Each returns the automations of an environment; those of all environments have the same name in each.
CAUSES: Causes = (deaths.automations, failures.automations, metrics.automations, overdue.automations)


def wanted(client: SyncPrefectClient, environment: str, causes: Causes = CAUSES) -> list[AutomationCore]:
    """Every automation of an environment.

    Raises:
        OpsError: one starts a flow that is not deployed.
    """
    return [automation for cause in causes for automation in cause(client, environment)]


def register(environment: str, *, paused: bool = False, causes: Causes = CAUSES) -> list[str]:
    """Create or update every automation of an environment; returns their names. One that somebody switched off stays
    off. `paused`: new ones that start flows are off until somebody switches them on."""
    with get_client(sync_client=True) as client:
        automations = wanted(client, environment, causes)
        for automation in automations:
            if existing := client.read_automations_by_name(automation.name):
                kept = automation.model_copy(update={"enabled": existing[0].enabled})
                client.update_automation(existing[0].id, kept)
            else:
                starts = any(isinstance(action, RunDeployment) for action in automation.actions)
                client.create_automation(automation.model_copy(update={"enabled": not (paused and starts)}))
    return [automation.name for automation in automations]


def listed(environment: str) -> dict[str, str]:
    """The automations of an environment by name, and what Prefect has of each: `on`, `off` or `missing`."""
    with get_client(sync_client=True) as client:
        return {one.name: _state(client, one.name) for one in wanted(client, environment)}


def _state(client: SyncPrefectClient, name: str) -> str:
    found = client.read_automations_by_name(name)
    return ("on" if found[0].enabled else "off") if found else "missing"


def remove(environment: str, *, causes: Causes = CAUSES) -> list[str]:
    """Delete the automations of an environment that Prefect has; returns their names. `register` brings them back."""
    removed = []
    with get_client(sync_client=True) as client:
        for automation in wanted(client, environment, causes):
            for found in client.read_automations_by_name(automation.name):
                client.delete_automation(found.id)
                removed.append(automation.name)
    return removed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="?", choices=["list", "register", "remove"], default="list")
    parser.add_argument("--paused", action="store_true", help="new ones that start flows are off")
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""))
    chosen = parser.parse_args()
    try:
        if not chosen.environment:
            raise OpsError("no environment is named", "say --environment NAME, or set OPS_ENVIRONMENT")
        if chosen.what == "list":
            lines = [f"{state:8} {name}" for name, state in listed(chosen.environment).items()]
        elif chosen.what == "register":
            lines = [f"registered {name}" for name in register(chosen.environment, paused=chosen.paused)]
        else:
            lines = [f"removed {name}" for name in remove(chosen.environment)]
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
