"""What scenarios have in common when they heal a system that a drill has left."""

from __future__ import annotations

import contextlib

from blocks.environment import START_ORDER, Environment
from runbook.errors import OpsError
from tasks.services import start_services


def start_everything(env: Environment) -> None:
    """Every service that the environment names. One that does not start is told by the sensors later."""
    followers = [node.service for node in env.nodes()] + ([env.wal.service] if env.has("wal") else [])
    for role in dict.fromkeys([*followers, *START_ORDER]):
        if role in env.services.names:
            with contextlib.suppress(OpsError):
                start_services(env.services, [role])
