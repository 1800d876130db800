"""Which users of the operating system an environment's services run as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from blocks.services.service import DockerServices, Services
from blocks.services.systemd import SystemdServices
from runbook.errors import OpsError
from runbook.kinds import probe


@dataclass(frozen=True)
class Account:
    """A service's: `user` is "" where nobody can say, and `problem` says why."""

    role: str
    service: str
    user: str
    problem: str = ""

    @property
    def is_root(self) -> bool:
        """Whoever breaks into it has the host."""
        return self.user == "root"


@probe
def read_accounts(services: Services, roles: Sequence[str]) -> tuple[Account, ...]:
    """The user of each service's main process, on this host."""
    return tuple(_account(services, role) for role in roles)


def _account(services: Services, role: str) -> Account:
    service = services.name_of(role)
    if isinstance(services, SystemdServices) and services.host:
        return Account(role, service, "", f"it runs on {services.host}")
    if isinstance(services, DockerServices) and services.host:
        return Account(role, service, "", f"it runs at {services.host}")
    try:
        state = services.state(role)
        if not state.pid:
            return Account(role, service, "", f"it does not run: {state.told}")
        return Account(role, service, psutil.Process(state.pid).username())
    except OpsError as error:
        return Account(role, service, "", error.message)
    except psutil.Error as error:
        return Account(role, service, "", f"its process cannot be looked at: {type(error).__name__}")
