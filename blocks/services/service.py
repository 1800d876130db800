"""Services of a host: started, stopped and looked at by role (`backend`), whatever runs them."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import Field

from blocks.docker import SOCKET, engine
from runbook.errors import OpsError
from runbook.masking import MASK
from runbook.units import counted

Role = Literal["postgres", "standby", "receiver", "archiver", "redis", "backend", "frontend"]
ROLES: tuple[Role, ...] = ("postgres", "standby", "receiver", "archiver", "redis", "backend", "frontend")
CALL_SECONDS = 180  # a stop takes its time


@dataclass(frozen=True)
class ServiceState:
    """What a manager says of a service, in its own words; its main process, 0 where there is none; and whether it runs
    it, or will start it again by itself."""

    told: str
    pid: int
    comes_back: bool


class Services(Block, abc.ABC):
    """What every service manager offers. `names` maps a role to the manager's own name for it; `hosts` a role to its
    manager's address (user@host, tcp://…, http://…), where that is another host's than the rest's: a standby's."""

    names: dict[str, str] = Field(default={}, description="role → unit, container or program")
    hosts: dict[str, str] = Field(default={}, description="role → its manager's address, where it is on another host")

    def name_of(self, role: str) -> str:
        """The manager's name of a role.

        Raises:
            OpsError: the environment names none.
        """
        if role not in self.names:
            raise OpsError(f"the environment names no service for {role}", "add it under [services.names]")
        return self.names[role]

    @property
    @abc.abstractmethod
    def is_here(self) -> bool:
        """Whether their processes are this host's: another one's have the same numbers."""

    @abc.abstractmethod
    def start(self, role: str) -> None:
        """Start it; `is_running` tells when it runs. Nothing happens where it runs already. One that is still stopping
        is started when it has stopped."""

    def stop(self, role: str) -> None:
        """Stop it; returns when its process has exited. Nothing happens where it is stopped.

        A cancelled run waits for the end of the stop too. The manager completes it in any case, and Docker takes a
        container that is stopping for one that runs: to start it then would do nothing.
        """
        try:
            self._stop(role)
        except Exception:
            raise
        except BaseException:
            with contextlib.suppress(OpsError):  # the cancel is the error to report
                self._stop(role)
            raise

    def restart(self, role: str) -> None:
        """Stop it, then start it."""
        self.stop(role)
        self.start(role)

    @abc.abstractmethod
    def _stop(self, role: str) -> None:
        """Stop it, as `stop` does in a run that is not cancelled. A second call waits for the stop of the first."""

    @abc.abstractmethod
    def is_running(self, role: str) -> bool:
        """Whether its process runs."""

    @abc.abstractmethod
    def state(self, role: str) -> ServiceState:
        """Whether it would come back: "not running" may be the moment between two starts."""

    @abc.abstractmethod
    def starts_at_boot(self, role: str) -> str:
        """What would start it when its host, or the manager itself, starts; "" where nothing does."""

    @property
    def can_disable(self) -> bool:
        """Whether the manager offers `disable`."""
        return True

    @abc.abstractmethod
    def disable(self, role: str) -> None:
        """Keep it from being started at boot, until `enable`.

        Raises:
            OpsError: the manager refuses, or offers no way.
        """

    def stays_disabled(self, role: str) -> bool:
        """Whether nothing would start it after `disable`."""
        return True

    def how_to_disable(self, role: str) -> str:
        """What a person does where `disable` cannot."""
        return f"disable {self.name_of(role)} on its host"

    def enable(self, role: str) -> str:
        """Undo `disable`; what is left to do by hand, "" where nothing is. Nothing happens where it is not disabled."""
        self.name_of(role)
        return ""

    @abc.abstractmethod
    def variables_obstacle(self, role: str, directory: str) -> str:
        """Why `set_variables` cannot be used, with what is missing; "" where it can."""

    def set_variables(self, role: str, directory: str, variables: Mapping[str, str]) -> None:
        """Restart it with more environment variables than it is configured with, which last until they are set to none:
        also over restarts by the manager. `directory`: where the manager reads more configuration.

        Raises:
            OpsError: see `variables_obstacle`.
        """
        raise OpsError(self.variables_obstacle(role, directory))

    @abc.abstractmethod
    def start_command(self, role: str) -> str:
        """The command with which a person starts it, on the manager's host."""

    def last_end(self, role: str) -> str:
        """How its process before the present one ended, in the manager's words; "" if the manager does not know."""
        self.name_of(role)
        return ""

    @abc.abstractmethod
    def logs(self, role: str, lines: int = 50) -> str:
        """The last lines that it printed."""

    @abc.abstractmethod
    def environment(self, role: str) -> dict[str, str]:
        """The names of its environment variables, their values masked."""


class DockerServices(Services):
    """Containers of a Docker Engine, by name."""

    _block_type_name = "Ops Docker services"
    _block_type_slug = "ops-docker-services"

    host: str = Field(default="", description="unix:///… or tcp://…; empty: this host's own")
    stop_seconds: int = Field(default=60, ge=1, description="between SIGTERM and SIGKILL")

    @property
    def is_here(self) -> bool:
        """By the socket."""
        return (self.host or os.environ.get("DOCKER_HOST") or SOCKET).startswith("unix:")

    def start(self, role: str) -> None:
        """`docker start`."""
        with self._container(role) as container:
            container.start()

    def _stop(self, role: str) -> None:
        """`docker stop`: returns when its process has exited."""
        with self._container(role) as container:
            container.stop(timeout=self.stop_seconds)

    def is_running(self, role: str) -> bool:
        """Whether its process runs; one that waits for its restart does not."""
        with self._container(role) as container:
            state = container.attrs["State"]
            return bool(state["Running"]) and not state["Restarting"]

    def state(self, role: str) -> ServiceState:
        """`docker inspect`: its status and restart policy. One that was stopped stays so until the engine starts."""
        with self._container(role) as container:
            state, host = container.attrs["State"], container.attrs["HostConfig"]
            told = f"{state['Status']}, restart: {(host.get('RestartPolicy') or {}).get('Name') or 'no'}"
            return ServiceState(told, int(state["Pid"]), state["Status"] in ("running", "restarting", "paused"))

    def starts_at_boot(self, role: str) -> str:
        """`docker inspect`: its restart policy. The engine starts those of any policy but `no` when it starts itself;
        whether a person stopped one before, which would matter, it does not report."""
        with self._container(role) as container:
            policy = (container.attrs["HostConfig"].get("RestartPolicy") or {}).get("Name") or "no"
            return "" if policy == "no" else f"restart: {policy}"

    def disable(self, role: str) -> None:
        """`docker update --restart no`."""
        with self._container(role) as container:
            container.update(restart_policy={"Name": "no"})

    def enable(self, role: str) -> str:
        """The engine has forgotten the policy that it had."""
        if self.starts_at_boot(role):
            return ""
        return f"its restart policy is no: docker update --restart unless-stopped {self.name_of(role)}"

    def variables_obstacle(self, role: str, directory: str) -> str:
        """A container keeps the variables of its creation."""
        return (
            f"Docker gives {self.name_of(role)} its variables when it creates the container: a drill would have to "
            "replace the container, and its image must contain the library"
        )

    def start_command(self, role: str) -> str:
        """`docker start`."""
        return f"docker start {self.name_of(role)}"

    def last_end(self, role: str) -> str:
        """`docker inspect`: only the restart policy's own starts are counted, after an end that nobody asked for."""
        with self._container(role) as container:
            count = int(container.attrs.get("RestartCount") or 0)
            return f"exited unexpectedly: its restart policy has started it {counted(count, 'time')}" if count else ""

    def logs(self, role: str, lines: int = 50) -> str:
        """`docker logs --tail`, both streams."""
        with self._container(role) as container:
            return str(container.logs(tail=lines).decode(errors="replace"))

    def environment(self, role: str) -> dict[str, str]:
        """The names of its variables, the image's own among them."""
        with self._container(role) as container:
            return {word.split("=", 1)[0]: MASK for word in container.attrs["Config"].get("Env") or []}

    def attributes(self, role: str) -> dict[str, Any]:
        """`docker inspect`. It has the values of environment variables, which may be secrets."""
        with self._container(role) as container:
            return dict(container.attrs)

    @contextlib.contextmanager
    def _container(self, role: str) -> Iterator[Any]:
        import docker.errors  # slow to import

        name = self.name_of(role)
        with engine(self.hosts.get(role, self.host), seconds=self.stop_seconds + CALL_SECONDS) as client:
            try:
                yield client.containers.get(name)
            except docker.errors.NotFound:
                raise OpsError(f"Docker knows no container {name}", "correct it under [services.names]") from None
