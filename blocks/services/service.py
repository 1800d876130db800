"""Services of a host: started, stopped and looked at by role (`backend`), whatever runs them."""

from __future__ import annotations

import abc
import contextlib
import http.client
import os
import re
import shlex
import xmlrpc.client
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from blocks.docker import SOCKET, engine
from runbook.errors import OpsError, Unreachable
from runbook.masking import MASK
from runbook.units import counted
from runbook.wait import until

Role = Literal["postgres", "standby", "receiver", "archiver", "redis", "backend", "frontend"]
ROLES: tuple[Role, ...] = ("postgres", "standby", "receiver", "archiver", "redis", "backend", "frontend")
# supervisor/xmlrpc.py: Faults
ALREADY_STARTED = 60
NOT_RUNNING = 70
NO_FILE = 20
CALL_SECONDS, READ_SECONDS = 180, 15  # a stop takes its time; who asks in an emergency must not wait for one that hangs
HERE = ("localhost", "127.0.0.1", "::1")
# supervisord starts what has exited again within a second, or not at all.
EXITED_SECONDS = 5
MAIN_LOG_BYTES = 64_000


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

    @property
    def how_to_disable(self) -> str:
        """What a person does where `disable` cannot."""
        return "disable it on its host"

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


class _Transport(xmlrpc.client.Transport):
    """A supervisord that hangs must not hang the run. Its own waiting (start, stop) is shorter than that."""

    def __init__(self, seconds: float, headers: list[tuple[str, str]]) -> None:
        super().__init__(headers=headers)
        self.seconds = seconds

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = self.seconds
        return connection


class SupervisorServices(Services):
    """Programs under supervisord, through its XML-RPC interface."""

    _block_type_name = "Ops supervisor services"
    _block_type_slug = "ops-supervisor"

    url: str = Field(default="http://127.0.0.1:9001", description="where supervisord listens")
    username: str = Field(default="")
    password: SecretStr = SecretStr("")

    @property
    def is_here(self) -> bool:
        """By its address."""
        return urlsplit(self.url).hostname in HERE

    def start(self, role: str) -> None:
        """`supervisor.startProcess`, not waiting for the second after which supervisord believes in it. While a process
        is STOPPING supervisord reports success and starts nothing."""

        def begun() -> bool:
            self._call(role, "startProcess", self.name_of(role), False, ignore=ALREADY_STARTED)
            return self.state(role).told not in ("STOPPING", "STOPPED")

        if not begun():
            until(begun, what=f"the end of {role}", seconds=CALL_SECONDS, every_seconds=0.1)

    def _stop(self, role: str) -> None:
        """`supervisor.stopProcess`, waiting. What has just exited is not running, and is started again at once: it is
        stopped when it is."""

        def stopped() -> bool:
            self._call(role, "stopProcess", self.name_of(role), True, ignore=NOT_RUNNING)
            return not self.state(role).comes_back

        if not stopped():
            until(stopped, what=f"the end of {role}", seconds=CALL_SECONDS, every_seconds=0.1)

    def is_running(self, role: str) -> bool:
        """Whether supervisord says RUNNING."""
        info = self._call(role, "getProcessInfo", self.name_of(role))
        return isinstance(info, dict) and info.get("statename") == "RUNNING"

    def state(self, role: str) -> ServiceState:
        """`supervisor.getProcessInfo`: STOPPED and FATAL are final, BACKOFF is not."""
        info = cast(dict[str, Any], self._call(role, "getProcessInfo", self.name_of(role)))
        state, since = str(info["statename"]), int(info["now"]) - int(info["stop"])
        final = state in ("STOPPED", "FATAL") or (state == "EXITED" and since > EXITED_SECONDS)
        return ServiceState(state, int(info["pid"]), not final)

    def starts_at_boot(self, role: str) -> str:
        """`supervisor.getAllConfigInfo`: whether supervisord starts it with itself."""
        return "autostart=true" if self._configured(role).get("autostart") else ""

    def variables_obstacle(self, role: str, directory: str) -> str:
        """The file is written here, and a group is taken up as a whole."""
        if role in self.hosts:
            return f"{self.name_of(role)} is a program of another host's supervisord"
        if not directory or not Path(directory).is_dir() or not os.access(directory, os.W_OK):
            return (
                f"{directory or 'directory'} is no directory that this worker can write: name the one whose *.conf "
                "supervisord reads ([include] files in its configuration)"
            )
        found = self._configured(role)
        if "command" not in found:
            return "this supervisord does not report its programs' commands: it needs version 4.2 or newer"
        return "" if found["group"] == found["name"] else f"{role} is one program of the group {found['group']}"

    def set_variables(self, role: str, directory: str, variables: Mapping[str, str]) -> None:
        """By a file after all others, which replaces the program's command by `env NAME=value … command`. The file is
        removed last: after a kill the next call finds it, and begins anew."""
        path = Path(directory) / f"zz-drill-{self.name_of(role)}.conf"
        if path.exists():
            path.write_text("")
            self._take_up(role)
            if not variables:
                path.unlink()
        if not variables:
            return
        if why := self.variables_obstacle(role, directory):
            raise OpsError(why)
        words = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command = f"{shlex.join(words)} {self._configured(role)['command']}".replace("%", "%%")
        path.write_text(f"[program:{self.name_of(role)}]\ncommand = {command}\n")
        if not self._take_up(role):
            path.unlink()
            raise OpsError(f"supervisord does not read {path}", f"add files = {directory}/*.conf to its [include]")

    def _take_up(self, role: str) -> bool:
        """Restart a program with its new configuration; False where that is the one it has."""
        group = self._configured(role, known=False).get("group", self.name_of(role))
        added, changed, _ = cast(list[list[list[str]]], self._call(role, "reloadConfig"))[0]
        if group in changed:
            self.stop(role)
            self._call(role, "removeProcessGroup", group)
        if group not in (*added, *changed):
            return False
        self._call(role, "addProcessGroup", group)
        self.start(role)
        return True

    def _configured(self, role: str, *, known: bool = True) -> dict[str, Any]:
        """`supervisor.getAllConfigInfo` of one program."""
        name = self.name_of(role)
        for found in cast(list[dict[str, Any]], self._call(role, "getAllConfigInfo")):
            if name in (found["name"], f"{found['group']}:{found['name']}"):
                return found
        if not known:
            return {}
        raise OpsError(f"supervisord knows no program {name}", "correct it under [services.names]")

    @property
    def can_disable(self) -> bool:
        """Its interface changes no configuration."""
        return False

    def disable(self, role: str) -> None:
        """See `can_disable`."""
        raise OpsError(f"supervisord cannot disable {self.name_of(role)}", self.how_to_disable)

    @property
    def how_to_disable(self) -> str:
        """supervisord's interface changes no configuration."""
        return "set autostart=false for it in supervisord's configuration, then: supervisorctl update"

    def start_command(self, role: str) -> str:
        """`supervisorctl start`."""
        return f"supervisorctl start {self.name_of(role)}"

    def last_end(self, role: str) -> str:
        """The last line about its end in supervisord's own log, as "terminated by SIGKILL; not expected"."""
        text = str(self._call(role, "readLog", -MAIN_LOG_BYTES, 0, ignore=NO_FILE) or "")
        return end_in(text, self.name_of(role).rpartition(":")[2])

    def logs(self, role: str, lines: int = 50) -> str:
        """The end of its standard output."""
        text = self._call(role, "readProcessStdoutLog", self.name_of(role), -lines * 200, 0, ignore=NO_FILE) or ""
        return "\n".join(str(text).splitlines()[-lines:])

    def environment(self, role: str) -> dict[str, str]:
        """supervisord does not tell a program's environment."""
        self.name_of(role)
        return {}

    def _call(self, role: str, method: str, *arguments: object, ignore: int = 0) -> object:
        url = self.hosts.get(role, self.url)
        login = f"{self.username}:{self.password.get_secret_value()}".encode()
        headers = [("Authorization", f"Basic {b64encode(login).decode()}")] if self.username else []
        transport = _Transport(CALL_SECONDS if method in ("startProcess", "stopProcess") else READ_SECONDS, headers)
        try:
            with xmlrpc.client.ServerProxy(f"{url}/RPC2", transport, allow_none=True) as server:
                return getattr(server.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == ignore:
                return None
            raise OpsError(
                f"supervisord refuses {' of '.join(map(str, (method, *arguments[:1])))}: {fault.faultString}"
            ) from None
        except xmlrpc.client.ProtocolError as error:
            raise OpsError(f"supervisord at {url} answers {error.errcode} {error.errmsg}") from None
        except (OSError, http.client.HTTPException):
            raise Unreachable(f"supervisord at {url} does not answer", "start it: services cannot run") from None


def end_in(log: str, name: str) -> str:
    """How a program ended last, by supervisord's log. A start that fails after an unexpected end is no end of its own:
    what was killed leaves memory and locks behind, which the next process may meet."""
    ended, counts = "", True
    for what, how in re.findall(rf"(exited|stopped|success):\s{re.escape(name)}\s(?:\((.+)\)|entered)", log):
        ended = how if how and counts else ended
        counts = what != "exited"
    return ended
