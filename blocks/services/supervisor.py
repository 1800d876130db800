"""Services that are programs under supervisord, on this host or on another."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import xmlrpc.client
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from pydantic import Field, SecretStr

from blocks.services.service import CALL_SECONDS, Services, ServiceState
from runbook.errors import OpsError, Unreachable
from runbook.wait import until

READ_SECONDS = 15  # who asks in an emergency must not wait for one that hangs
HERE = ("localhost", "127.0.0.1", "::1")
# supervisor/xmlrpc.py: Faults
ALREADY_STARTED = 60
NOT_RUNNING = 70
NO_FILE = 20
# supervisord starts what has exited again within a second, or not at all.
EXITED_SECONDS = 5
MAIN_LOG_BYTES = 64_000


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
        raise OpsError(f"supervisord cannot disable {self.name_of(role)}", self.how_to_disable(role))

    def how_to_disable(self, role: str) -> str:
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
