"""What the runbook's tests share: processes that really die, and a Prefect server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from lab.control import LabControl
from lab.state.base import create_base
from lab.state.environment import api_url
from runbook.wait import until
from tests.runbook.system import System

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""What runs a program like a container on the host's network: the same host name, other process ids."""


class Actor:
    """`python -m tests.runbook.MODULE …` as a process of its own; what it prints is read from a file."""

    def __init__(
        self, directory: Path, module: str, *words: object, launcher: Sequence[str] = (), **environment: str
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.printed = directory / f"actor-{uuid.uuid4().hex[:6]}.txt"
        argv = [*launcher, sys.executable, "-m", f"tests.runbook.{module}", *map(str, words)]
        with self.printed.open("w") as out:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return self.printed.read_text()

    def says(self, word: str, seconds: float = 180) -> str:
        """Wait for a line that starts with `word`; returns the rest of it."""

        def line() -> str | None:
            assert self.process.poll() is None or f"{word} " in self.text, f"the actor ended:\n{self.text}"
            return next((line for line in self.text.splitlines() if line.startswith(f"{word} ")), None)

        found = until(line, what=f"“{word}”", seconds=seconds, every_seconds=0.02)
        assert found
        return found.removeprefix(word).strip()

    def kill(self) -> None:
        """SIGKILL, and the zombie is left: nobody may have collected it when the next run asks for the lock."""
        self.process.send_signal(signal.SIGKILL)

    def end(self) -> int:
        """Its exit code; killed where it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        return self.process.wait(180)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A target of its own name, its reports in the test's directory."""
    return System(tmp_path / "reports")


@pytest.fixture
def actors(tmp_path: Path) -> Iterator[list[Actor]]:
    """Actors that a test appends to; all are ended after it."""
    started: list[Actor] = []
    yield started
    for actor in started:
        actor.end()


@pytest.fixture(scope="session")
def prefect_server() -> str:
    """The address of the tests' Prefect server: the lab's, without the lab. The session's end stops it."""
    control = LabControl.prepare(create_base()).launch().wait()
    assert os.environ["PREFECT_API_URL"] == api_url(control.state), "a stranger took its port: run the tests again"
    return api_url(control.state)
