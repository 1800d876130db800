"""The Docker SDK's options of a container that the environment configures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks.docker import Container
from runbook.errors import OpsError

MODES = ("host", "none")
SECOND = 1_000_000_000


def options(one: Container) -> dict[str, Any]:
    """The keyword arguments of `containers.create`."""
    probing = {"test": ["CMD", *one.health], "interval": 2 * SECOND, "timeout": 5 * SECOND, "retries": 3}
    return {
        "command": one.command or None,
        "environment": variables(Path(one.env_file)) if one.env_file else {},
        "network_mode": one.network,
        "ports": {} if one.network in MODES else one.ports,
        "volumes": one.volumes,
        "mem_limit": one.memory,
        "mem_reservation": one.reservation,
        "nano_cpus": round(one.cpus * SECOND),
        "restart_policy": {"Name": one.restart},
        "healthcheck": probing if one.health else None,
    }


def variables(path: Path) -> dict[str, str]:
    """Read NAME=value lines; empty lines and comments (#) are skipped.

    Raises:
        OpsError: the file cannot be read, or a line is invalid. The message contains no value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OpsError(
            f"{path} cannot be read: {type(error).__name__}", "correct env_file, or its permissions"
        ) from None
    found = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.strip().partition("=")
        if not name or name.startswith("#"):
            continue
        if not equals or not name.isidentifier():
            raise OpsError(f"{path}, line {number} is not NAME=value", "correct it")
        found[name] = value
    return found
