"""What an automation starts: a deployment's run."""

from __future__ import annotations

from collections.abc import Mapping

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import RunDeployment
from prefect.exceptions import ObjectNotFound

from runbook.errors import OpsError


def launch(client: SyncPrefectClient, environment: str, flow: str, parameters: Mapping[str, object]) -> RunDeployment:
    """A run of `flow` (its name, `clear-cache`) in an environment. A parameter that is a template alone keeps its type:
    `"{{ event.payload.metric }}"`; UUIDs need `| string`, what may be missing `| default("")`.

    Raises:
        OpsError: that flow is not deployed for the environment.
    """
    try:
        found = client.read_deployment_by_name(f"{flow}/{environment}")
    except ObjectNotFound:
        raise OpsError(
            f"{flow} is not deployed for {environment}",
            f"OPS_ENVIRONMENT={environment} prefect --no-prompt deploy --all, then register the automations",
        ) from None
    given = {"environment": environment, **parameters}
    return RunDeployment.model_validate({"deployment_id": found.id, "parameters": given})
