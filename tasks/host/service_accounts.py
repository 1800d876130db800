"""Operating system users of an environment's services."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from blocks.services.service import DockerServices, Services
from blocks.services.systemd import SystemdServices
from runbook.errors import OpsError
from runbook.kinds import probe


@dataclass(frozen=True)
class ServiceAccount:
    """A service's user. `user` is "" if it is unknown, and `problem` is the reason."""

    role: str
    service: str
    user: str
    problem: str = ""

    @property
    def is_root(self) -> bool:
        """Whether it runs as root: an intruder would control the host."""
        return self.user == "root"


@probe
def read_accounts(services: Services, roles: Sequence[str]) -> tuple[ServiceAccount, ...]:
    """The user of each service's main process, on this host."""
    return tuple(_account(services, role) for role in roles)


def _account(services: Services, role: str) -> ServiceAccount:
    service = services.name_of(role)
    if isinstance(services, SystemdServices) and services.host:
        return ServiceAccount(role, service, "", f"it runs on {services.host}")
    if isinstance(services, DockerServices) and services.host:
        return ServiceAccount(role, service, "", f"it runs at {services.host}")
    try:
        state = services.state(role)
        if not state.pid:
            return ServiceAccount(role, service, "", f"it is stopped: {state.told}")
        return ServiceAccount(role, service, psutil.Process(state.pid).username())
    except OpsError as error:
        return ServiceAccount(role, service, "", error.message)
    except psutil.Error as error:
        return ServiceAccount(role, service, "", f"its process cannot be inspected: {type(error).__name__}")
