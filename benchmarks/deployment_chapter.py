"""What Prefect's side costs: a deployment of every runbook, a click in the UI, and many environments on one server.

python -m benchmarks --only deployments --environments 200
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import WorkerStatus

from benchmarks.figures import Figure
from benchmarks.place import NAME, Place, wait_quiet
from lab.control import LabControl
from lab.state.base import CHECKOUT, base_directory
from runbook import shell
from runbook.errors import OpsError
from runbook.units import size
from runbook.wait import until

CLICKS = 3
DEPLOY_BAR, CLICK_BAR = 8.0, 2.5
# The largest flow's plan, and a small one.
CLICKED = ("full-restore", "backup-redis")
# In one process: what is measured is the server with so many environments, not so many imports.
DEPLOY_MANY = """
import os, sys
from deployments.deploy import deploy
for number in range(*map(int, sys.argv[1:])):
    os.environ.update(OPS_LAB_NAME=f"bench-{number}", OPS_ENVIRONMENT=f"bench-{number}")
    deploy(f"bench-{number}", paused=True)
"""


@dataclass(frozen=True)
class DeploymentChapter:
    """The measurements, on a lab without runbooks."""

    place: Place

    def figures(self, environments: int = 1) -> list[Figure]:
        """A deployment, the clicks; then, where there are to be more `environments`, one more beside so many.

        Raises:
            OpsError: a deployment failed, or a run did not begin.
        """
        LabControl.prepare(base_directory()).create_pool(NAME)
        first, again = self._deploy(NAME), self._deploy(NAME)
        with get_client(sync_client=True) as client:
            entries = sum(one.work_pool_name == NAME for one in _pages(client.read_deployments))
            figures = [
                Figure.seconds(f"deployments.deploy of an environment, {entries} deployments", [first], DEPLOY_BAR),
                Figure.seconds("… again, with a new version", [again]),
                *self._clicks(client),
            ]
        return [*figures, *(self._many(environments, first) if environments > 1 else [])]

    def _deploy(self, name: str) -> float:
        variables = {"OPS_LAB_NAME": name, "OPS_ENVIRONMENT": name}
        argv = [sys.executable, "-m", "deployments.deploy", "--environment", name, "--registered", "--paused"]
        wait_quiet()
        started = time.monotonic()
        shell.run(argv, directory=CHECKOUT, environment=variables, inherit=("*",))
        took = time.monotonic() - started
        self.place.tell(f"deployed {name}: {took:.1f} s")
        return took

    def _clicks(self, client: SyncPrefectClient) -> list[Figure]:
        """From the request that a click sends to the begin of the first step, in turns with an empty flow."""
        deployments = _deployments(client)
        ids = {name: deployments[f"{name}/{NAME}"] for name in CLICKED} | {"empty": _empty(client)}
        took: dict[str, list[float]] = {name: [] for name in ids}
        with _worker(client):
            for number in range(1 + CLICKS):
                for name, deployment in ids.items():
                    parameters = {} if name == "empty" else {"environment": NAME}
                    seconds = _click(client, deployment, parameters)
                    if number:  # the first run of each compiles and reads its modules
                        took[name].append(seconds)
        self.place.tell("; ".join(f"{name}: {statistics.median(seconds):.2f} s" for name, seconds in took.items()))
        empty = statistics.median(took["empty"])
        return [
            Figure(
                f"click → first step: {name} (peer: an empty flow)",
                statistics.median(took[name]),
                CLICK_BAR,
                statistics.median(took[name]),
                empty,
                unit="s",
            )
            for name in CLICKED
        ]

    def _many(self, environments: int, first: float) -> list[Figure]:
        """One more environment, at ever more of them, and the memory of Prefect's server."""
        figures, begin = [], 1
        for until_ in (environments // 4, environments // 2, environments):
            argv = [sys.executable, "-c", DEPLOY_MANY, str(begin), str(until_)]
            for number in range(begin, until_):
                LabControl.prepare(base_directory()).create_pool(f"bench-{number}")
            shell.run(argv, directory=CHECKOUT, environment={"PYTHONPATH": str(CHECKOUT)}, inherit=("*",))
            begin = until_
            took = self._deploy(f"bench-{until_ - 1}")
            memory = _server_bytes()
            shown = f"{took:.1f} s; {size(memory)} of memory in Prefect's server"
            figures.append(Figure(f"one more environment next to {until_ - 1}", took, None, took, first, "s", shown))
            self.place.tell(f"{until_} environments: {shown}")
        return figures


def _deployments(client: SyncPrefectClient) -> dict[str, Any]:
    """Ids by flow and name."""
    flows = {one.id: one.name for one in _pages(client.read_flows)}
    return {f"{flows[one.flow_id]}/{one.name}": one.id for one in _pages(client.read_deployments)}


def _pages(read: Any) -> Iterator[Any]:
    offset = 0
    while page := read(limit=200, offset=offset):
        yield from page
        offset += len(page)


def _empty(client: SyncPrefectClient) -> Any:
    flow = client.create_flow_from_name("empty")
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}]
    return client.create_deployment(
        flow_id=flow,
        name=NAME,
        entrypoint="benchmarks.empty_flow.empty",
        work_pool_name=NAME,
        pull_steps=pull,
        enforce_parameter_schema=False,
    )


@contextlib.contextmanager
def _worker(client: SyncPrefectClient) -> Iterator[None]:
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", NAME, "--type", "process", "--name", NAME]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        try:

            def polls() -> bool:
                return any(one.status == WorkerStatus.ONLINE for one in client.read_workers_for_work_pool(NAME))

            until(polls, what="the worker", seconds=60)
            yield
        finally:
            worker.kill()  # it has no run any more


def _click(client: SyncPrefectClient, deployment: Any, parameters: dict[str, Any]) -> float:
    wait_quiet()  # the run before this one is over, and Prefect's server still records it
    created = datetime.now(UTC)
    run = client.create_flow_run_from_deployment(deployment, parameters=parameters)

    def ended() -> bool:
        state = client.read_flow_run(run.id).state
        return state is not None and state.is_final()

    until(ended, what="the run's end", seconds=120)
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))

    def begun() -> list[datetime]:  # Prefect records a task's run from events, a moment later
        return [step.start_time for step in client.read_task_runs(flow_run_filter=chosen) if step.start_time]

    first = min(until(begun, what="the run's first step in Prefect", seconds=60))
    return (first - created).total_seconds()


def _server_bytes() -> int:
    """Of the memory of Prefect's server, what it has for itself."""
    control = LabControl.prepare(base_directory())
    pid = control.supervisor.services()["server"].pid
    if not pid:
        raise OpsError("Prefect's server does not run")
    return sum(
        one.memory_full_info().uss for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    )
