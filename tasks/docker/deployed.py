"""The application's containers as they are: which version, and whether they are well."""

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
    """What a role's container is now: `image_id` and `reference` are "" where there is none. `before`: the image of the
    one that was set aside and not removed yet, "" where there is none."""

    role: str
    name: str
    reference: str
    image_id: str
    version: str
    running: bool
    before: str


@dataclass(frozen=True)
class RunState:
    """How a container runs by the engine's word. `health` is that of its check, "healthy" where it has none."""

    status: str
    health: str
    restarts: int
    started: str

    @property
    def well(self) -> bool:
        """At this moment: one that dies again and again is well in between."""
        return self.status == "running" and self.health == "healthy"

    def __str__(self) -> str:
        health = f", {self.health}" if self.status == "running" and self.health != "healthy" else ""
        return f"{self.status}{health}" + (f" after {self.restarts} restarts" if self.restarts else "")


def aside(name: str) -> str:
    """What a container is called while its successor has to prove itself."""
    return f"{name}-before"


def failed(name: str) -> str:
    """The name of a container that was not healthy, until its log has been read."""
    return f"{name}-failed"


@probe
def read_deployed(block: Docker, roles: Sequence[str]) -> list[Deployed]:
    """What is there now.

    Raises:
        Unreachable: the engine does not answer.
    """
    found = []
    with engine(block.host) as client:
        for role in roles:
            name = block.name_of(role)
            one, before = find(client, name), find(client, aside(name))
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
                    before.attrs["Config"]["Image"] if before else "",
                )
            )
    return found


@probe
def read_log(block: Docker, role: str, lines: int = 30) -> str:
    """The end of what a role's new container printed, secrets masked: of the failed one where it was set aside."""
    with engine(block.host) as client:
        one = find(client, failed(block.name_of(role))) or find(client, block.name_of(role))
        return masked(one.logs(tail=lines).decode(errors="replace")) if one else ""


@probe
def read_states(block: Docker, roles: Sequence[str]) -> Mapping[str, RunState]:
    """How the containers of roles run.

    Raises:
        Unreachable: the engine does not answer.
    """
    found = {}
    with engine(block.host) as client:
        for role in roles:
            one = find(client, block.name_of(role))
            state: dict[str, Any] = one.attrs["State"] if one else {"Status": "gone"}
            health = (state.get("Health") or {}).get("Status", "healthy")
            restarts = int(one.attrs.get("RestartCount") or 0) if one else 0
            found[role] = RunState(str(state["Status"]), str(health), restarts, str(state.get("StartedAt", "")))
    return found


def find(client: Any, name: str) -> Any:
    """The container of that name, None where there is none."""
    try:
        return client.containers.get(name)
    except docker.errors.NotFound:
        return None
