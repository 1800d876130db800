"""docs/adopting.md, typed as it stands: by a reader whose system is the lab, under a name of its own.

The rest of the documentation's commands that need a system are run by: `make demo`, tests/lab/test_deployed.py; `make lab`,
every test with a lab; `make drill`, tests/recovery; `make docs`, tests/docs/test_site.py; the recoveries from the
command line, tests/recovery.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse

from deployments.runbooks import read_runbooks, shown
from lab.client import Lab
from tests.docs.commands import ROOT, blocks

NAME = "adopted"
GUIDE = ROOT / "docs" / "adopting.md"
ENDS_SECONDS = 120
# As a person's shell starts it, or a supervisor. What a script starts behind an `&`, these tests perhaps, passes on that
# SIGINT is ignored; and Prefect's worker turns SIGTERM into SIGINT.
STOPPABLE = ("env", "--default-signal=INT")

pytestmark = pytest.mark.system


def step(text: str) -> str:
    """The block that has this line, for the reader's environment."""
    (found,) = [block.text for block in blocks(GUIDE) if text in block.text]
    return found.replace("production", NAME)


@pytest.fixture
def shell(place: Lab) -> Iterator[dict[str, str]]:
    """A reader's shell after step 4: a Prefect server, secrets, and a description of the system."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    named = {"OPS_LAB_NAME": NAME, "OPS_ENVIRONMENT": NAME, "PYTHONPATH": ""}
    yield {**kept, **place.environ(), **named, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    with get_client(sync_client=True) as client:
        forget(client)


def forget(client: SyncPrefectClient) -> None:
    """The reader's environment is gone from the server that the other tests look at."""
    for automation in client.read_automations():
        if NAME in automation.name:
            client.delete_automation(automation.id)
    with ThreadPoolExecutor(8) as beside:
        list(beside.map(client.delete_deployment, [one.id for one in deployed(client)]))
    client.delete_work_pool(NAME)


def typed(text: str, shell: dict[str, str], seconds: float = 600) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT, env=shell, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def worker(shell: dict[str, str]) -> Iterator[None]:
    """Step 6; stopped as its supervisor stops it, which it must obey."""
    text = step("prefect worker start").replace("prefect worker", "exec prefect worker")
    started = subprocess.Popen(
        [*STOPPABLE, "bash", "-euc", text],
        cwd=ROOT, env=shell, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
        started.terminate()
        started.wait(ENDS_SECONDS)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def deployed(client: SyncPrefectClient) -> list[DeploymentResponse]:
    return client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[NAME])))


def test_from_the_description_to_the_first_run(shell: dict[str, str]) -> None:
    """Steps 5, 6 and 7. Two runs at once: each waits for the worker."""
    answer = typed(step("deployments.deploy"), shell)
    assert f"registered block ops-environment/{NAME}" in answer
    assert f"registered lock env-{NAME}" in answer
    assert "registered automation" in answer
    with get_client(sync_client=True) as client:
        told = {one.entrypoint: one.description for one in deployed(client)}
    assert told == {one.entrypoint: shown(one.entrypoint) for one in read_runbooks()}
    runs = step("prefect deployment run").splitlines()[:2]
    with worker(shell), ThreadPoolExecutor(len(runs)) as beside:
        list(beside.map(lambda run: typed(run, shell), runs))
