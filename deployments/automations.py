"""Automations, by name and idempotent: registered, listed, removed.

OPS_ENVIRONMENT=staging python -m deployments.automations [list | register | remove]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore

from deployments.triggers import deaths
from runbook.errors import OpsError

# Each returns the automations of an environment; those of all environments have the same name in each.
CAUSES: Sequence[Callable[[str], list[AutomationCore]]] = (deaths.automations,)


def wanted(environment: str) -> list[AutomationCore]:
    """Every automation of an environment."""
    return [automation for cause in CAUSES for automation in cause(environment)]


def register(environment: str) -> list[str]:
    """Create or update every automation of an environment; returns their names."""
    with get_client(sync_client=True) as client:
        for automation in wanted(environment):
            existing = client.read_automations_by_name(automation.name)
            if existing:
                client.update_automation(existing[0].id, automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted(environment)]


def listed(environment: str) -> dict[str, bool]:
    """The automations of an environment by name, and whether Prefect has each."""
    with get_client(sync_client=True) as client:
        return {one.name: bool(client.read_automations_by_name(one.name)) for one in wanted(environment)}


def remove(environment: str) -> list[str]:
    """Delete the automations of an environment that Prefect has; returns their names. `register` brings them back."""
    removed = []
    with get_client(sync_client=True) as client:
        for automation in wanted(environment):
            for found in client.read_automations_by_name(automation.name):
                client.delete_automation(found.id)
                removed.append(automation.name)
    return removed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="?", choices=["list", "register", "remove"], default="list")
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""))
    chosen = parser.parse_args()
    try:
        if not chosen.environment:
            raise OpsError("no environment is named", "say --environment NAME, or set OPS_ENVIRONMENT")
        if chosen.what == "list":
            lines = [f"{'there' if there else 'missing'}  {name}" for name, there in listed(chosen.environment).items()]
        else:
            done = register if chosen.what == "register" else remove
            lines = [f"{chosen.what}: {name}" for name in done(chosen.environment)]
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
