"""Automations, by name and idempotent: registered, listed, removed.

OPS_ENVIRONMENT=staging python -m deployments.automations [list | register | remove]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.sorting import AutomationSort
from prefect.events.actions import RunDeployment
from prefect.events.filters import AutomationFilter, AutomationFilterName, AutomationFilterTags
from prefect.events.schemas.automations import Automation, AutomationCore

from deployments.triggers import deaths, failures, metrics, overdue
from runbook.drivers import exit_code
from runbook.errors import OpsError

Causes = Sequence[Callable[[SyncPrefectClient, str], list[AutomationCore]]]
TAG, OF_ONE, OF_ALL = "interview-ops", "of-one-environment", "of-all-environments"
WAITS = "registered-paused"
"""A tag of what was registered with --paused: registering it without that switches it on."""
MOST = 200
# Each returns the automations of an environment; those of all environments have the same name in each.
CAUSES: Causes = (deaths.automations, failures.automations, metrics.automations, overdue.automations)


def wanted(client: SyncPrefectClient, environment: str, causes: Causes = CAUSES) -> list[AutomationCore]:
    """Every automation of an environment.

    Raises:
        OpsError: one starts a flow that is not deployed.
    """
    return [_with_tags(automation, environment) for cause in causes for automation in cause(client, environment)]


def _with_tags(automation: AutomationCore, environment: str) -> AutomationCore:
    """Its name may change from version to version: whose it is says a tag."""
    is_own = automation.name.endswith(f"-{environment}")
    return automation.model_copy(update={"tags": [TAG, OF_ONE, _tag(environment)] if is_own else [TAG, OF_ALL]})


def register(environment: str, *, paused: bool = False, causes: Causes = CAUSES) -> list[str]:
    """Create or update every automation of an environment, and delete what it had besides (of another name, or twice);
    returns their names. One that somebody switched off stays off. `paused`: new ones that start flows are off until
    somebody switches them on, or this is called without it."""
    with get_client(sync_client=True) as client:
        automations = wanted(client, environment, causes)
        left = {one.id: one.name for one in _tagged(client, _tag(environment))}
        named = _named(client, [automation.name for automation in automations])
        for automation in automations:
            for number, one in enumerate(found := named[automation.name]):
                if number:
                    left[one.id] = one.name
                else:
                    left.pop(one.id, None)
                    _update(client, one, automation, paused=paused)
            if not found:
                waits = paused and any(isinstance(action, RunDeployment) for action in automation.actions)
                client.create_automation(_waiting(automation) if waits else automation)
        for identity in left:
            client.delete_automation(identity)
    return [automation.name for automation in automations]


def _waiting(automation: AutomationCore) -> AutomationCore:
    return automation.model_copy(update={"enabled": False, "tags": [*automation.tags, WAITS]})


def _update(client: SyncPrefectClient, found: Automation, automation: AutomationCore, *, paused: bool) -> None:
    """Only what is new: an update makes Prefect forget what it has counted ("once an hour") and for whom it waits (a
    run that has died just now)."""
    waits = WAITS in found.tags and not found.enabled
    if waits and paused:
        kept = _waiting(automation)
    else:
        kept = automation.model_copy(update={"enabled": found.enabled or waits})
    if kept.model_dump() != found.model_dump(exclude={"id"}):
        client.update_automation(found.id, kept)


def _tag(environment: str) -> str:
    return f"environment:{environment}"


def _named(client: SyncPrefectClient, names: Sequence[str]) -> dict[str, list[Automation]]:
    """Every automation of each name, the one that was updated last first."""
    wanted = AutomationFilter(name=AutomationFilterName(any_=list(names)))
    found, by_name = list[Automation](), dict[str, list[Automation]]()
    while page := client.read_automations(
        automations=wanted, sort=AutomationSort.UPDATED_DESC, limit=MOST, offset=len(found)
    ):
        found += page
    for name in names:
        by_name[name] = [one for one in found if one.name == name]
    return by_name


def _tagged(client: SyncPrefectClient, tag: str) -> list[Automation]:
    both = AutomationFilter(tags=AutomationFilterTags(all_=[TAG, tag]))
    return client.read_automations(automations=both, limit=MOST)


def listed(environment: str) -> dict[str, str]:
    """The automations of an environment by name, and what Prefect has of each: `on`, `off` or `missing`."""
    with get_client(sync_client=True) as client:
        return {one.name: _state(client, one.name) for one in wanted(client, environment)}


def _state(client: SyncPrefectClient, name: str) -> str:
    found = client.read_automations_by_name(name)
    return ("on" if found[0].enabled else "off") if found else "missing"


def remove(environment: str) -> list[str]:
    """Delete the automations that an environment has in Prefect, with those of all environments where it was the last;
    returns their names. `register` brings them back."""
    with get_client(sync_client=True) as client:
        found = _tagged(client, _tag(environment))
        others = {one.id for one in _tagged(client, OF_ONE)} - {one.id for one in found}
        if not others:
            found += _tagged(client, OF_ALL)
        for one in found:
            client.delete_automation(one.id)
    return [one.name for one in found]


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
    sys.exit(exit_code(main))
