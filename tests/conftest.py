"""The lab for tests: real servers of this pytest run alone, never the ones that `make lab` brought up.

Ports and passwords are chosen when this file is imported, because Prefect reads its settings when *it* is imported; the
servers start with the first test that asks for `lab`. Under xdist every worker has a lab of its own, `test-gw0` and so
on, and all share one Prefect server, which the controller stops at the end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fixtures.ports import export_ports  # noqa: E402

export_ports()

from lab import lifecycle  # noqa: E402
from lab.client import Lab  # noqa: E402
from lab.processes import heed_interrupts  # noqa: E402
from lab.progress import silent  # noqa: E402
from lab.state.base import base_directory  # noqa: E402
from runbook.errors import OpsError  # noqa: E402

pytest_plugins = (
    "tests.fixtures.servers",
    "tests.plugins.own_segments",
    "tests.plugins.shared",
    "tests.fixtures.prefect_client",
    "tests.plugins.tidy",
    "tests.plugins.lists",
    "tests.plugins.ordered",
    "tests.plugins.lab_workers",
    "tests.redis.servers",
    "tests.s3.servers",
    "tests.fixtures.postgres.clusters",
    "tests.fixtures.logfiles",
    "tests.fixtures.application.checkouts",
    "tests.fixtures.advisories",
    "tests.fixtures.application.packaged",
    "tests.fixtures.application.served",
    "tests.fixtures.workday",
)

_BASE = "OPS_LAB_BASE"
_LOG_LINES = 30
_LOGGING = {"lab", "prefect_server"}
"""Fixtures with servers of ours."""


def _remove(base: Path) -> None:
    """Stop everything of one base directory and remove it."""
    kept = os.environ.get(_BASE)
    os.environ[_BASE] = str(base)
    lifecycle.down_all(silent, remove=True)
    shutil.rmtree(base, ignore_errors=True)
    os.environ.pop(_BASE)
    if kept is not None:
        os.environ[_BASE] = kept


def _own_base() -> Path | None:
    """A new base directory for this run; None when the caller or the xdist controller chose one."""
    if _BASE in os.environ:
        return None
    runs = base_directory() / ".tests"
    for left in runs.glob("*"):  # of runs that were killed
        if left.name.isdecimal() and not psutil.pid_exists(int(left.name)):
            with contextlib.suppress(FileNotFoundError):  # another run that begins now removes it too
                _remove(left)
    os.environ[_BASE] = str(runs / str(os.getpid()))
    return Path(os.environ[_BASE])


heed_interrupts()
OWN_BASE = _own_base()
os.environ["XDG_STATE_HOME"] = str(base_directory() / "state")  # this tool's own state (runbook/files/state.py)
PREPARED = Lab.prepared(f"test-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
os.environ.update(PREPARED.environ())


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A lab with 3 MB of data, its variables in `os.environ`: flows can be called in this process. A file of tests leaves
    it as it found it, which is checked."""
    from tests.plugins.tidy import tidy  # which imports Prefect

    running = Lab.up(PREPARED.name, megabytes=3)
    assert running.environ().items() <= os.environ.items(), "a stranger took a port since this run began: run it again"
    try:
        with tidy(running):
            yield running
    finally:
        running.down()


@pytest.fixture(scope="session")
def deployed(lab: Lab) -> Lab:
    """The same with a worker and every runbook in Prefect: for what is launched there, or linked to."""
    return Lab.up(lab.name, megabytes=3, runbooks=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failing test that uses the lab: the ends of the servers' logs."""
    report = yield
    if report.failed and _LOGGING & set(getattr(item, "fixturenames", ())):
        with contextlib.suppress(OpsError, OSError):  # it is down already
            for path in PREPARED.logs():
                lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
                report.sections.append((f"end of {path.name}", "\n".join(lines)))
    return report


def pytest_collection_finish() -> None:
    """What imports and the collection made stays until the end: the garbage collector need not walk it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """After the last worker: stop and remove whatever is left of this run."""
    if OWN_BASE and not hasattr(config, "workerinput"):
        _remove(OWN_BASE)
