"""The channel by which Prefect's server itself tells that escalation does not work: a block of Prefect's own."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from blocks.people.alerts import Alerts, Channel
from tasks.alerts import message as form

# Filled in by the block: its own subject and body, and what it keeps masked.
MESSAGE = form.AlertMessage("trigger", "escalation", "server", "Prefect", True, "{{ subject }}", "{{ body }}")
KEY = "{{ key }}"


def server_channel(alerts: Alerts, environment: str) -> CustomWebhookNotificationBlock | None:
    """The first of the environment's channels that is an address, None where there is none."""
    ways: dict[Channel, tuple[SecretStr, dict[str, Any]]] = {
        "pagerduty": (SecretStr(alerts.pagerduty_url), form.pagerduty(MESSAGE, KEY)),
        "slack": (alerts.slack_url, form.slack(MESSAGE)),
        "teams": (alerts.teams_url, form.teams(MESSAGE)),
        "webhook": (alerts.webhook_url, form.plain(MESSAGE)),
    }
    for channel in alerts.channels:
        if channel in ways:
            url, body = ways[channel]
            secrets = {"url": url.get_secret_value(), "key": alerts.pagerduty_key.get_secret_value()}
            return CustomWebhookNotificationBlock(
                name=f"{channel} of {environment}",
                url="{{ url }}",
                json_data=body,
                headers=None,
                cookies=None,
                secrets=SecretDict(secrets),
            )
    return None


def block_name(environment: str) -> str:
    """Of the block of that channel."""
    return f"alerts-{environment}"


def read_server_channel(client: SyncPrefectClient, environment: str) -> UUID | None:
    """Its block, where `deployments.register` has saved one."""
    try:
        slug = CustomWebhookNotificationBlock.get_block_type_slug()
        return client.read_block_document_by_name(block_name(environment), slug).id
    except ObjectNotFound:
        return None
