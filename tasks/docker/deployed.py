"""The application's containers: their versions and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import docker.errors

from blocks.docker import Docker, engine
from runbook.kinds import probe
from runbook.masking import masked
from tasks.docker.building import VERSION


@dataclass(frozen=True)
class Deployed:
    """A role's container; `image_id` and `reference` are "" if there is none. `previous`: the image of the container
    that an interrupted deployment kept, "" if there is none."""

    role: str
    name: str
    reference: str
    image_id: str
    version: str
    running: bool
    previous: str


@dataclass(frozen=True)
class RunState:
    """A container's state by the engine. `health`: by its health check, "healthy" without one."""

    status: str
    health: str
    restarts: int
    started: str

    @property
    def healthy(self) -> bool:
        """Whether it is healthy now; a container that restarts repeatedly is so in between."""
        return self.status == "running" and self.health == "healthy"

    def __str__(self) -> str:
        health = f", {self.health}" if self.status == "running" and self.health != "healthy" else ""
        return f"{self.status}{health}" + (f" after {self.restarts} restarts" if self.restarts else "")


def previous_name(name: str) -> str:
    """The name of an old container until the new one is proven."""
    return f"{name}-before"


def failed_name(name: str) -> str:
    """The name of an unhealthy new container until its log is read."""
    return f"{name}-failed"


@probe
def read_deployed(block: Docker, roles: Sequence[str]) -> list[Deployed]:
    """Read the containers of roles.

    Raises:
        Unreachable: the engine does not answer.
    """
    found = []
    with engine(block.host) as client:
        for role in roles:
            name = block.name_of(role)
            one, previous = find(client, name), find(client, previous_name(name))
            labels = one.attrs["Config"].get("Labels") or {} if one else {}
            reference = one.attrs["Config"]["Image"] if one else ""
            version = labels.get(VERSION) or ("" if "sha256:" in reference else reference.rpartition(":")[2])
            found.append(
                Deployed(
                    role,
                    name,
                    reference,
                    one.attrs["Image"] if one else "",
                    version,
                    bool(one and one.status == "running"),
                    previous.attrs["Config"]["Image"] if previous else "",
                )
            )
    return found


@probe
def read_log(block: Docker, role: str, lines: int = 30) -> str:
    """The last lines of a role's new container, or of its failed one; secrets are masked."""
    with engine(block.host) as client:
        one = find(client, failed_name(block.name_of(role))) or find(client, block.name_of(role))
        return masked(one.logs(tail=lines).decode(errors="replace")) if one else ""


@probe
def read_states(block: Docker, roles: Sequence[str]) -> Mapping[str, RunState]:
    """Read the states of the containers of roles.

    Raises:
        Unreachable: the engine does not answer.
    """
    found = {}
    with engine(block.host) as client:
        for role in roles:
            one = find(client, block.name_of(role))
            state: dict[str, Any] = one.attrs["State"] if one else {"Status": "missing"}
            health = (state.get("Health") or {}).get("Status", "healthy")
            restarts = int(one.attrs.get("RestartCount") or 0) if one else 0
            found[role] = RunState(str(state["Status"]), str(health), restarts, str(state.get("StartedAt", "")))
    return found


def find(client: Any, name: str) -> Any:
    """The container of that name, or None."""
    try:
        return client.containers.get(name)
    except docker.errors.NotFound:
        return None
