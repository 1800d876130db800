"""What people find a runbook by in the Prefect UI: a deployment for each symptom, and the table of start-here.

Prefect's search box finds a deployment by its name or its flow's name, by nothing else (3.9.1). A runbook's own
deployment is called as the environment: `full-restore/production` is its address. So each symptom of
flows/troubleshooting/symptoms.toml is a further deployment of its first runbook, with its parameters, whose name is the
symptom in both languages, the environment's first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse

from flows.troubleshooting import symptoms
from runbook.language.say import Language
from runbook.next import Next
from runbook.page.form import form_path
from runbook.page.markdown import link

START = "start-here"
TAG = "symptom"
PAGE = 200
_NEITHER = ("schedules", "schedule_needs", "paused")


def symptom_entries(
    deployed: Sequence[Mapping[str, Any]], environment: str, language: Language, no_tag: str = ""
) -> Iterator[dict[str, Any]]:
    """An entry for start-here and for each symptom whose first runbook is among the entries `deployed`: without its
    schedules, and without the tag `no_tag`."""
    own = {flow_in(entry): entry for entry in deployed if entry["name"] == environment}
    named = [(symptoms.start_name_in(environment, language), Next(START))]
    named += [(one.name_in(environment, language), one.first) for one in symptoms.read_symptoms()]
    for name, first in named:
        if entry := own.get(first.flow):
            kept = {key: value for key, value in entry.items() if key not in _NEITHER}
            given = {**entry["parameters"], **first.parameters}
            tags = [*(tag for tag in entry["tags"] if tag != no_tag), TAG]
            yield {**kept, "name": name, "parameters": given, "tags": tags}


def flow_in(entry: Mapping[str, Any]) -> str:
    """`full-restore` of the entrypoint `flows.recovery.full_restore.full_restore`."""
    return str(entry["entrypoint"]).rpartition(".")[2].replace("_", "-")


def read_symptom_deployments(environment: str) -> dict[str, DeploymentResponse]:
    """The deployments of an environment's symptoms that Prefect has, by flow and name."""
    wanted, found = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG])), list[DeploymentResponse]()
    with get_client(sync_client=True) as client:
        while page := client.read_deployments(deployment_filter=wanted, limit=PAGE, offset=len(found)):
            found += page
    own = [one for one in found if one.parameters.get("environment") == environment]
    return {f"{flow_in({'entrypoint': one.entrypoint})}/{one.name}": one for one in own}


def describe_start(
    deployments: Mapping[str, DeploymentResponse], environment: str, about: str, language: Language
) -> None:
    """Put the table of symptoms into the description of start-here, between the title and the rest of `about`.
    `deployments`: those of the environment, by flow and name."""

    def opened(one: Next) -> str:
        there = deployments.get(f"{one.flow}/{environment}")
        # Relative to the page: who deploys may not know under which address people reach the UI.
        return link(one.flow, form_path(there.id, {"environment": environment, **one.parameters})) if there else ""

    title, _, rest = about.partition("\n")
    text = f"{title}\n\n{symptoms.table(opened, language)}\n\n{rest.strip()}\n"
    with get_client(sync_client=True) as client:
        for name in (environment, symptoms.start_name_in(environment, language)):
            if there := deployments.get(f"{START}/{name}"):
                _describe(client, there, text)


def _describe(client: SyncPrefectClient, there: DeploymentResponse, text: str) -> None:
    client.update_deployment(there.id, DeploymentUpdate(description=text))
