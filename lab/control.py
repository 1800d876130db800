"""The Prefect server and one worker per lab, under a supervisor of their own: they outlive the lab's services."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from lab.processes import MARK, OsAccount, end, exclusive, listener, marked, run, write
from lab.progress import Tell
from lab.servers.services import supervisor_of
from lab.servers.supervision import Program, Supervisor
from lab.state.base import CHECKOUT, PYTHON
from lab.state.environment import api_url, operator_environment, server_variables
from lab.state.layout import ControlLayout, Layout
from lab.state.state import (
    ControlState,
    free_port,
    is_free,
    is_listening,
    load_control,
    load_state,
    save,
    taken_ports,
)
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.wait import until

_USUAL_PORT = 4200
_ANSWER_SECONDS = 30
"""A server that is busy with deployments, beside tests, takes its time."""
_SOURCES = ("runbook", "blocks", "tasks", "flows", "deployments")


@dataclass(frozen=True)
class LabControl:
    """The control plane of one base directory."""

    layout: ControlLayout
    state: ControlState

    @classmethod
    def find(cls, base: Path) -> LabControl | None:
        """None when it was never set up here."""
        layout = ControlLayout(base)
        state = load_control(layout.state)
        return cls(layout, state) if state and state.root == str(layout.root) else None

    @classmethod
    def prepare(cls, base: Path) -> LabControl:
        """Found, or set up with ports and a password, not yet started."""
        with exclusive(base / ".control.lock"):
            if found := cls.find(base):
                return found
            layout = ControlLayout(base)
            us = OsAccount.current()
            for path in (layout.root, layout.home, layout.logs, layout.workers, layout.deployments):
                us.directory(path, 0o700)
            # Bases of tests and benchmarks that begin at the same time would all choose the usual port.
            taken = taken_ports(base)
            port = free_port(taken, 0 if "OPS_LAB_BASE" in os.environ else _USUAL_PORT)
            state = ControlState(str(layout.root), port, free_port([*taken, port]))
            save(layout.state, state)
            return cls(layout, state)

    @property
    def supervisor(self) -> Supervisor:
        return Supervisor(
            self.layout.supervisor, self.state.supervisor_port, self.state.supervisor_password, self.layout.logs
        )

    def is_healthy(self) -> bool:
        """Return True if our server answers a query of its database. A stranger on its port gets no password."""
        try:
            ours = self.supervisor.is_running() and self._listens()
            return ours and self._call("POST", "flows/count", seconds=_ANSWER_SECONDS).is_success
        except httpx.HTTPError:
            return False

    def launch(self) -> LabControl:
        """Start the server, without waiting for it; returns the control plane with the ports that it has now."""
        with exclusive(self.layout.base / ".control.lock"):
            now = LabControl.find(self.layout.base) or self
            if now.supervisor.is_running():
                now._write()
                now.supervisor.reread()  # an earlier version started it without a log-in
                now.supervisor.start("server")
                return now
            now._end_orphans()
            if not (is_free(now.state.port) and is_free(now.state.supervisor_port)):
                now = now._with_new_ports(free_port(now._taken(), now.state.port))
            for worker in now.layout.workers.glob("*.conf"):
                if not _lab_runs(now.layout.base, worker.stem):
                    worker.unlink()  # its lab's `up` brings it back
            now._write()
            now.supervisor.launch(operator_environment())
            return now

    def wait(self, seconds: float = 300) -> LabControl:
        """Wait until the server answers; returns the control plane with its port, another one where a stranger's
        server, such as the lab's of another checkout, took the first.

        Raises:
            OpsError: it does not answer in time.
        """
        now = self

        def ready() -> bool:
            nonlocal now
            if now.is_healthy():
                return True
            if is_listening(now.state.port) and not now._listens():
                now = now._move()
            return False

        try:
            until(ready, what="the Prefect server's start", seconds=seconds, every_seconds=0.2)
        except Unreachable as error:
            raise OpsError(error.message, f"see {self.layout.logs / 'server.log'}") from error
        return now

    def shutdown(self) -> None:
        """Stop the workers, their runs, and the server."""
        with exclusive(self.layout.base / ".control.lock"):
            self.supervisor.shutdown()
            end(marked(self.layout.supervisor), seconds=10)

    def create_pool(self, name: str) -> None:
        """The environment's work pool of type process, if it is not there."""
        if self._call("GET", f"work_pools/{name}").status_code == httpx.codes.OK:
            return
        from prefect.workers.process import ProcessWorker  # takes more than a second

        body = {"name": name, "type": "process", "base_job_template": ProcessWorker.get_default_base_job_template()}
        answer = self._call("POST", "work_pools/", body)
        if answer.status_code not in (httpx.codes.CREATED, httpx.codes.CONFLICT):
            raise OpsError(f"the work pool {name} cannot be created: {answer.status_code} {answer.text[:200]}")

    def start_worker(self, name: str, environment: Mapping[str, str], *, retention: bool = False) -> None:
        """Start the environment's worker, and what prunes its backups; a running one is restarted only if its
        environment is new."""
        argv = (PYTHON, "-m", "prefect", "worker", "start", "--pool", name, "--type", "process", "--name", name)
        program = Program(f"worker-{name}", argv, CHECKOUT, environment, autostart=True)
        programs = [program]
        if retention:
            pruning = (PYTHON, "-m", "lab.retention", "--name", name)
            programs.append(Program(f"retention-{name}", pruning, CHECKOUT, environment, autostart=True))
        text, path = "\n".join(map(self.supervisor.section, programs)), self.layout.worker(name)
        with exclusive(self.layout.base / ".control.lock"):
            if not path.exists() or path.read_text() != text:
                write(path, text, 0o600)
            self.supervisor.reread()
            for one in programs:
                self.supervisor.start(one.name)

    def stop_worker(self, name: str) -> None:
        """Stop the environment's worker and take it out of the configuration."""
        with exclusive(self.layout.base / ".control.lock"):
            self.layout.worker(name).unlink(missing_ok=True)
            if self.supervisor.is_running():
                self.supervisor.reread()

    def register(self, name: str, environment: Mapping[str, str], tell: Tell) -> None:
        """The environment's blocks and lock, and those of the region into which it may recover, if anything changed.

        Raises:
            OpsError: it failed; its last lines are the message.
        """
        self._once("register", name, environment, (name, environment["OPS_OTHER_REGION"]), tell)

    def deploy(self, name: str, environment: Mapping[str, str], tell: Tell) -> None:
        """Deploy its flows and automations, once its blocks are registered, if anything changed.

        Schedules are production's: in a lab a person turns on, in the UI, what is to run by itself. A check that is red
        because nobody has taken a backup yet would fail every five minutes.

        Raises:
            OpsError: it failed; its last lines are the message.
        """
        self._once("deploy", name, environment, ("--environment", name, "--registered", "--paused"), tell)

    def _once(self, what: str, name: str, environment: Mapping[str, str], words: Sequence[str], tell: Tell) -> None:
        fingerprint, stamp = _fingerprint(environment), self.layout.done(what, name)
        if stamp.exists() and stamp.read_text() == fingerprint and self._knows(what, name):
            return
        stamp.parent.mkdir(exist_ok=True)
        stamp.unlink(missing_ok=True)
        program, shell = f"deployments.{what}", {**operator_environment(), **environment}
        with exclusive(self.layout.base / ".deploy.lock"):  # Prefect's own registration of block types races
            try:
                run([PYTHON, "-m", program, *words], cwd=CHECKOUT, environment=shell, seconds=600)
            except CommandFailed as error:
                last = "\n".join(error.stderr.splitlines()[-15:])
                raise OpsError(f"{program} exited {error.exit_code}:\n{last}") from error
        tell(f"{program} done for {name}")
        write(stamp, fingerprint, 0o600)

    def _knows(self, what: str, name: str) -> bool:
        """Whether Prefect's database, which somebody may have reset, still has it."""
        if what == "register":
            path = f"block_types/slug/ops-environment/block_documents/name/{name}"
            return self._call("GET", path).status_code == httpx.codes.OK
        body = {"work_pools": {"name": {"any_": [name]}}}
        answer = self._call("POST", "deployments/count", body)
        return answer.status_code == httpx.codes.OK and int(answer.text) > 0

    def _call(self, method: str, path: str, body: object = None, *, seconds: float = 120) -> httpx.Response:
        address, login = f"{api_url(self.state)}/{path}", self.state.login
        return httpx.request(method, address, json=body, auth=login, timeout=seconds, trust_env=False)

    def _listens(self) -> bool:
        """Return True if a process of our supervisor listens on the port."""
        process = listener(self.state.port)
        with contextlib.suppress(psutil.Error):
            return process is not None and process.environ().get(MARK) == str(self.layout.supervisor)
        return False

    def _move(self) -> LabControl:
        """Start the server on another port."""
        with exclusive(self.layout.base / ".control.lock"):
            now = LabControl.find(self.layout.base) or self
            if now.state.port == self.state.port:
                moved = dataclasses.replace(self.state, port=free_port([*self._taken(), self.state.port]))
                now = dataclasses.replace(self, state=moved)
                save(now.layout.state, moved)
                now._write()
                now.supervisor.reread()
                now.supervisor.start("server")
            return now

    def _taken(self) -> list[int]:
        return taken_ports(self.layout.base, self.layout.root.name)

    def _with_new_ports(self, port: int) -> LabControl:
        supervisor = free_port([*self._taken(), port])
        state = dataclasses.replace(self.state, port=port, supervisor_port=supervisor)
        save(self.layout.state, state)
        return dataclasses.replace(self, state=state)

    def _write(self) -> None:
        self.supervisor.write([self._server()], include="workers/*.conf")

    def _server(self) -> Program:
        argv = (PYTHON, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.state.port))
        environment = server_variables(self.layout, self.state)
        return Program("server", argv, self.layout.root, environment, stop_group=True, autostart=True)

    def _end_orphans(self) -> None:
        """End servers and workers of a killed supervisor; runs of flows go on: they may be recoveries."""
        orphans = [process for process in marked(self.layout.supervisor) if not _is_run(process)]
        end(orphans, seconds=1, how=signal.SIGKILL)  # on SIGTERM a worker would take its runs with it


def _lab_runs(base: Path, name: str) -> bool:
    layout = Layout(base, name)
    state = load_state(layout.state)
    return state is not None and supervisor_of(layout, state).is_running()


def _is_run(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.environ().get("PREFECT__FLOW_RUN_ID"))
    return False


def _fingerprint(environment: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(environment.items())).encode())
    for folder in _SOURCES:
        for path in sorted((CHECKOUT / folder).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(os.fsencode(path.relative_to(CHECKOUT)) + b"\0" + path.read_bytes())
    digest.update((CHECKOUT / "prefect.yaml").read_bytes())
    return digest.hexdigest()
