"""What an automation starts: a deployment's run."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

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
    given = {"environment": environment, **parameters}
    found = deployed(client, environment, flow, f"{flow}/{environment}")
    return RunDeployment.model_validate({"deployment_id": found, "parameters": given})


def deployed(client: SyncPrefectClient, environment: str, what: str, name: str) -> UUID:
    """The id of a deployment of that name.

    Raises:
        OpsError: there is none.
    """
    try:
        return client.read_deployment_by_name(name).id
    except ObjectNotFound:
        raise OpsError(
            f"{what} is not deployed for {environment}", f"python -m deployments.deploy --environment {environment}"
        ) from None
