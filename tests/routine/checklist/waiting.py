"""A worker of a test's own for one flow that waits for people, on the tests' real Prefect server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prefect import Flow
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.types.entrypoint import EntrypointType

from deployments import register
from deployments.maintenance import name_in
from lab.control import LabControl
from lab.processes import exclusive
from lab.runs import Runs
from lab.state.base import base_directory
from lab.state.environment import api_url, auth_string, prefect_variables
from runbook.wait import until

ROOT = Path(__file__).resolve().parents[3]
TOML = """
name = "{name}"
title = "試験環境"
reports = "{directory}/reports"
{more}
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
"""


@dataclass
class Waiting:
    """An environment, its deployments, and a worker that may be killed."""

    name: str
    directory: Path
    control: LabControl
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def runs(self) -> Runs:
        base = f"http://127.0.0.1:{self.control.state.port}"
        return Runs(f"{base}/api", f"{base}/v2", auth_string(self.control.state))

    @property
    def reports(self) -> Path:
        return self.directory / "reports"

    def deploy(self, *flows: Flow[..., Any], suffix: str = "", **parameters: object) -> None:
        """As prefect.yaml does, without its schedule."""
        for one in flows:
            deployment = one.to_deployment(
                f"{self.name}-{suffix}" if suffix else self.name,
                parameters={"environment": self.name, **parameters},
                work_pool_name=self.name,
                entrypoint_type=EntrypointType.MODULE_PATH,
                job_variables={"working_dir": str(ROOT), "env": {"PYTHONPATH": str(ROOT)}},
            )
            deployment.apply()  # type: ignore[unused-coroutine]

    def start_worker(self) -> None:
        """Its log is in the test's directory."""
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.name, "--type", "process"]
        log = (self.directory / f"worker-{len(self.workers)}.log").open("wb")
        own = {
            **prefect_variables(self.control.layout, self.control.state),
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
        }
        with log:
            self.workers.append(
                subprocess.Popen(
                    argv,
                    cwd=self.directory,
                    env={**os.environ, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def kill_worker(self) -> None:
        """SIGKILL, with whatever it started."""
        worker = self.workers[-1]
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(worker.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGKILL)
        worker.kill()
        worker.wait(120)

    def launch(self, deployment: str, **parameters: object) -> str:
        """`flow`, or `flow/suffix` as in the maintenance table. The run's id."""
        found = self.runs.call("GET", f"/deployments/name/{name_in(self.name, deployment)}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.runs.call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run: str) -> dict[str, Any]:
        return dict(self.runs.call("GET", f"/flow_runs/{run}"))

    def asks(self, run: str, key: str) -> dict[str, Any]:
        """Wait until the run waits with the form of `key`; the form's JSON schema."""

        def waits() -> dict[str, Any] | None:
            state = self.run(run)["state"]
            assert state["type"] not in ("FAILED", "CRASHED", "COMPLETED"), f"{state}\n{self.log()}"
            keys = (state["state_details"] or {}).get("run_input_keyset") or {}
            return keys if state["name"] == "Suspended" and keys["schema"] == f"suspended-{key}-schema" else None

        keys = until(waits, what=f"the form {key}", seconds=240, every_seconds=0.2)
        assert keys
        return dict(until(lambda: self.read(run, keys["schema"]), what="the form's schema", seconds=120))

    def read(self, run: str, key: str) -> Any:
        """An input of the run, None where there is none."""
        found = self.runs.call("POST", f"/flow_runs/{run}/input/filter", {"prefix": key})
        return next((json.loads(one["value"]) for one in found if one["key"] == key), None)

    def answer(self, run: str, given: Mapping[str, object]) -> str:
        """As the UI does; ACCEPT or REJECT."""
        return str(self.runs.call("POST", f"/flow_runs/{run}/resume", {"run_input": dict(given)})["status"])

    def ends(self, run: str) -> dict[str, Any]:
        """Its final state."""

        def ended() -> dict[str, Any] | None:
            state = self.run(run)["state"]
            return state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        found = until(ended, what="the run's end", seconds=240, every_seconds=0.2)
        assert found
        return dict(found)

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in self.directory.glob("worker-*.log"))


@contextlib.contextmanager
def waiting(
    directory: Path, flows: Sequence[Flow[..., Any]], more: str = "", control: LabControl | None = None
) -> Iterator[Waiting]:
    """An environment of a new name, registered, its flows deployed; no worker yet. The server is the session's, where
    no other is given."""
    control = control or LabControl.find(base_directory())
    assert control
    name = f"t{uuid.uuid4().hex[:12]}"
    made = Waiting(name, directory, control)
    path = directory / "environment.toml"
    path.write_text(TOML.format(name=name, directory=directory, more=more))
    kept = {key: os.environ.get(key) for key in ("OPS_ENVIRONMENT", "OPS_ENVIRONMENT_FILE")}
    os.environ |= {"OPS_ENVIRONMENT": name, "OPS_ENVIRONMENT_FILE": str(path)}
    try:
        settings = {PREFECT_API_URL: api_url(control.state), PREFECT_API_AUTH_STRING: auth_string(control.state)}
        with (
            temporary_settings(settings),
            exclusive(base_directory() / ".deploy.lock"),
        ):  # Prefect's own registration of block types races
            register.register(name)
            control.create_pool(name)
            made.deploy(*flows)
        yield made
    finally:
        for worker in made.workers:
            if worker.poll() is None:
                made.kill_worker()
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
