"""The newest backups in the help of the forms that name one.

Prefect's form (3.9.1) does not show the `examples` of a parameter, and an `enum` would refuse a date, a path, and a
backup that was taken since. So they are in the field's description. A deleted backup may be listed until the next check
of the objectives or the next backup; a plan that does not find it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext

from runbook import clock
from runbook.guard.brief import BUSY_SECONDS, asked_briefly, busy, impatient_client
from runbook.language.say import label
from runbook.log import logger
from runbook.units import size
from runbook.wait import until
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Kind

FORMS: dict[str, Kind | None] = {
    "full-restore": "postgres",
    "restore-database": "postgres",
    "restore-tables": "postgres",
    "restore-redis": "redis",
    "restore-files": "files",
    "restore-to-point": "cluster",
    "restore-prefect": "prefect",
    "rehearse-prefect-upgrade": "prefect",
    "verify-backup": None,
}
"""Flows whose parameter `backup` names a backup of this kind; None: of the kind of another parameter."""
MARK = " ｜ "
NEWEST, MOST_DEPLOYMENTS = 5, 200


def offer_backups(environment: str, stored: Mapping[Kind, Sequence[Backup]]) -> None:
    """Put the newest backups of each kind into the forms of an environment, in the run's zone and language.

    Only within a flow run: outside one Prefect may be down. An error is logged: the forms work without.
    """
    if FlowRunContext.get() is None:
        return

    def described() -> bool:
        try:
            with asked_briefly(), impatient_client() as client:
                for one in _forms(client, environment):
                    if (kind := _kind(one)) in stored:
                        _describe(client, one, f"{MARK}{label('newest first')}: {offered(stored[kind])}")
        except httpx.HTTPStatusError as error:
            raise busy(error) from None
        return True

    try:
        until(described, what="an answer of Prefect about the forms", seconds=BUSY_SECONDS)
    except Exception as error:
        logger().warning("the forms do not list the newest backups: %s", error)


def offered(backups: Iterable[Backup]) -> str:
    """`backup_20261129_030000 (2026-11-29 03:00:00 +09:00, 426.0 MB, verified); …`, or `none`."""
    newest = sorted(backups, key=lambda one: one.manifest.taken, reverse=True)[:NEWEST]
    return "; ".join(f"{one.name} ({clock.text(one.manifest.taken)}, {_state(one)})" for one in newest) or label("none")


def _state(one: Backup) -> str:
    proof = "FAILED its verification" if one.failed else "verified" if one.is_proven else "not verified"
    return f"{size(one.manifest.bytes)}, {label(proof)}"


def _forms(client: SyncPrefectClient, environment: str) -> list[DeploymentResponse]:
    """But for those that only a schedule launches."""
    named = FlowFilter(name=FlowFilterName(any_=list(FORMS)))
    found = client.read_deployments(flow_filter=named, limit=MOST_DEPLOYMENTS)
    own = [one for one in found if one.parameters.get("environment") == environment]
    return [one for one in own if one.name == environment or not one.schedules]


def _kind(one: DeploymentResponse) -> Kind:
    flow = str(one.entrypoint).rpartition(".")[2].replace("_", "-")
    return FORMS.get(flow) or cast(Kind, one.parameters.get("kind", "postgres"))


def _describe(client: SyncPrefectClient, one: DeploymentResponse, more: str) -> None:
    schema: dict[str, Any] = one.parameter_openapi_schema or {}
    field = schema.get("properties", {}).get("backup")
    if field is None:
        return
    text = str(field.get("description", "")).partition(MARK)[0] + more
    if text != field.get("description"):
        field["description"] = text
        client.update_deployment(one.id, DeploymentUpdate.model_validate({"parameter_openapi_schema": schema}))
