"""docs/adopting.md, typed as it stands: by a reader whose system is the lab, under a name of its own.

The rest of the documentation's commands that need a system are run by: `make demo`, tests/lab/test_deployed.py; `make lab`,
every test with a lab; `make drill`, tests/recovery; `make docs`, tests/docs/test_site.py; the recoveries from the
command line, tests/recovery.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from lab.client import Lab
from runbook.wait import until
from tests.docs.commands import ROOT, blocks

NAME = "adopted"
PAGES = [ROOT / "docs" / "adopting.md", ROOT / "docs" / "adopting.ja.md"]


def step(text: str, page: Path = PAGES[0]) -> str:
    """The block that has this line, for the reader's environment."""
    (found,) = [block.text for block in blocks(page) if text in block.text]
    return found.replace("production", NAME)


@pytest.fixture(scope="module")
def shell(lab: Lab) -> dict[str, str]:
    """A reader's shell after step 4: a Prefect server, secrets, and a description of the system."""
    kept = ("PATH", "HOME", "LANG")
    mine = {name: os.environ[name] for name in kept if name in os.environ}
    named = {"OPS_LAB_NAME": NAME, "OPS_ENVIRONMENT": NAME}
    return {
        **mine,
        **lab.environ(),
        **named,
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": "",
    }


def typed(text: str, shell: dict[str, str], seconds: float = 600) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT, env=shell, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_japanese_page_has_the_same_commands() -> None:
    english, japanese = ([block.text for block in blocks(page)] for page in PAGES)
    assert english == japanese


@pytest.mark.soak
def test_from_the_description_to_the_first_run(shell: dict[str, str]) -> None:
    """Steps 5, 6 and 7."""
    told = typed(step("deployments.register"), shell)
    assert f"registered block ops-environment/{NAME}" in told
    assert f"registered lock env-{NAME}" in told
    worker = subprocess.Popen(
["bash", "-euc", step("prefect worker start").replace("prefect worker", "exec prefect worker")],
        cwd=ROOT, env=shell, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        api = shell["PREFECT_API_URL"]
        workers = f"{api}/work_pools/{NAME}/workers/filter"
        until(lambda: httpx.post(workers, json={}, timeout=60).json(), what="the worker", seconds=180)
        first, second = step("prefect deployment run").splitlines()[:2]
        typed(first, shell)
        typed(second, shell)
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        worker.wait(120)
