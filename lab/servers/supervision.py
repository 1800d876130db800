"""supervisord as the service manager: its configuration, its life, and its XML-RPC.

https://supervisord.org/configuration.html and https://supervisord.org/api.html
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import shlex
import signal
import sys
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.processes import MARK, alive, end, pid_in, run, write
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.wait import until

_ALREADY_STARTED, _NOT_RUNNING, _BAD_NAME = 60, 70, 10


@dataclass(frozen=True)
class Program:
    """One supervised service. `user` is "" for supervisord's own."""

    name: str
    argv: Sequence[str | Path]
    cwd: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = ""
    stop_signal: str = "TERM"
    stop_group: bool = False
    autostart: bool = False
    umask: str = "022"


@dataclass(frozen=True)
class Service:
    """What supervisord says of a program. `pid` is 0 when it is not running."""

    name: str
    state: str
    pid: int

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"


class _Transport(xmlrpc.client.Transport):
    """A hung supervisord must not hang us: stopping PostgreSQL may take its 30 s, nothing takes longer."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = 180
        return connection


@dataclass(frozen=True)
class Supervisor:
    """A supervisord on 127.0.0.1, known by its configuration file."""

    configuration: Path
    port: int
    password: str = field(repr=False)
    logs: Path

    @property
    def pid_file(self) -> Path:
        return self.configuration.with_suffix(".pid")

    def write(self, programs: Sequence[Program], include: str = "") -> None:
        """Write the configuration, mode 0600. `include` is a glob relative to it."""
        text = _section(
            "supervisord",
            {
                "identifier": str(self.configuration),
                "pidfile": str(self.pid_file),
                "logfile": str(self.logs / "supervisord.log"),
                "logfile_maxbytes": "5MB",
                "logfile_backups": "1",
                "umask": "022",
                "nocleanup": "true",
                "minfds": "1024",
                **({"user": "root"} if os.geteuid() == 0 else {}),
            },
        )
        text += _section(
            "rpcinterface:supervisor",
            {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        )
        text += _section(
            "inet_http_server", {"port": f"127.0.0.1:{self.port}", "username": "ops", "password": self.password}
        )
        text += "".join(self.section(program) for program in programs)
        text += _section("include", {"files": include}) if include else ""
        write(self.configuration, text, 0o600)

    def section(self, program: Program) -> str:
        """The program's part of the configuration."""
        environment = {**program.environment, MARK: str(self.configuration)}
        return _section(
            f"program:{program.name}",
            {
                "command": " ".join(shlex.quote(str(word)) for word in program.argv),
                "directory": str(program.cwd),
                "environment": ",".join(f"{name}={_quoted(name, value)}" for name, value in environment.items()),
                **({"user": program.user} if program.user else {}),
                "umask": program.umask,
                "autostart": str(program.autostart).lower(),
                "autorestart": "true",
                "startsecs": "1",
                "startretries": "1000",
                "stopsignal": program.stop_signal,
                "stopwaitsecs": "30",
                "stopasgroup": str(program.stop_group).lower(),
                "killasgroup": "true",
                "redirect_stderr": "true",
                "stdout_logfile": str(self.logs / f"{program.name}.log"),
                "stdout_logfile_maxbytes": "20MB",
                "stdout_logfile_backups": "1",
            },
        )

    def launch(self, environment: Mapping[str, str]) -> None:
        """Start supervisord as a daemon; it holds nothing of this terminal.

        Raises:
            OpsError: it did not start.
        """
        own = {**environment, MARK: str(self.configuration)}
        argv = (sys.executable, "-m", "supervisor.supervisord", "-c", str(self.configuration))
        try:
            run(argv, cwd=self.configuration.parent, environment=own)
        except CommandFailed as error:
            raise OpsError(f"supervisord did not start: {error.message}", f"see {self.logs}") from error
        until(self.is_running, what="supervisord's start", seconds=120, every_seconds=0.05)

    def is_running(self) -> bool:
        """Whether this very supervisord answers (not a stranger, not a copy's original)."""
        try:
            return bool(self._call("getIdentification") == str(self.configuration))
        except Unreachable:
            return False

    def pid(self) -> int | None:
        """supervisord's process id, when it is alive."""
        process = alive(pid_in(self.pid_file))
        # The pid may have been given out again since supervisord was killed.
        return process.pid if process and str(self.configuration) in process.cmdline() else None

    def services(self) -> dict[str, Service]:
        """Every program by name.

        Raises:
            Unreachable: supervisord does not answer.
        """
        rows = self._call("getAllProcessInfo")
        return {row["name"]: Service(row["name"], row["statename"], int(row["pid"])) for row in rows}

    def start(self, name: str) -> None:
        """Ask for a program's start, if it is not running; whether it serves is for the caller to find out.

        Raises:
            OpsError: supervisord cannot start it.
        """
        try:
            self._call("startProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != _ALREADY_STARTED:
                raise OpsError(f"{name} does not start: {fault.faultString}", f"see {self.logs / name}.log") from fault

    def stop(self, name: str) -> None:
        """Stop a program, if it is running, and wait for its end."""
        try:
            self._call("stopProcess", name)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode not in (_NOT_RUNNING, _BAD_NAME):
                raise OpsError(f"{name} does not stop: {fault.faultString}") from fault

    def reread(self) -> None:
        """Take up included programs that were added, changed or removed; changed ones are restarted."""
        added, changed, removed = self._call("reloadConfig")[0]
        for name in (*changed, *removed):
            self.stop(name)
            self._call("removeProcessGroup", name)
        for name in (*changed, *added):
            self._call("addProcessGroup", name)

    def shutdown(self, seconds: float = 45) -> None:
        """Stop every program, all at once, then supervisord itself, which is killed after `seconds`."""
        try:
            self._call("stopAllProcesses", False)
            self._call("shutdown")
        except (Unreachable, xmlrpc.client.Fault):
            if process := alive(self.pid()):
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(Unreachable):
            until(lambda: self.pid() is None, what="supervisord's end", seconds=seconds)
        if process := alive(self.pid()):
            end([process], seconds=1, how=signal.SIGKILL)
        self.pid_file.unlink(missing_ok=True)

    def _call(self, method: str, *arguments: object) -> Any:
        # In a header: an address with the password in it would stand in every error message.
        login = base64.b64encode(f"ops:{self.password}".encode()).decode()
        proxy = xmlrpc.client.ServerProxy(
            f"http://127.0.0.1:{self.port}/RPC2", _Transport(headers=[("Authorization", f"Basic {login}")])
        )
        try:
            with proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise Unreachable(f"supervisord on port {self.port} does not answer: {error}") from error


def _section(name: str, values: Mapping[str, str]) -> str:
    # Every value goes through Python's %-expansion in supervisor.
    lines = "".join(f"{key} = {value.replace('%', '%%')}\n" for key, value in values.items())
    return f"[{name}]\n{lines}\n"


def _quoted(name: str, value: str) -> str:
    if "'" in value or "\n" in value:
        raise OpsError(f"supervisord cannot pass on {name}: its value has a quote or a line break in it")
    return f"'{value}'"
