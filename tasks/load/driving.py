"""A run of Locust, with samples of the system's resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from blocks.places import Application
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.kinds import action
from runbook.masking import without
from runbook.wait import until
from tasks.application.http_steps import secrets_of, values_of
from tasks.load.results import Results, read_results, write_results

LOCUST: Sequence[str] = (sys.executable, "-m", "locust")
USERS = Path(__file__).with_name("users.py")
LOG, TABLE = "locust.log", "endpoints.csv"
STOP_SECONDS = 15
GRACE_SECONDS = 120.0  # for its start under load, and for requests that hang at the end
LAST = 2000
INSTALL = "install it where this flow runs: pip install 'interview-ops[load]'"


@dataclass(frozen=True)
class LoadRequest:
    """The number of users, users added per second, the duration, and the most AI answers."""

    users: int
    spawn_rate: int
    seconds: int
    ai_answers: int

    @property
    def told(self) -> str:
        """The load in words. Tests with the same words are compared."""
        return f"{self.users} users, {self.spawn_rate}/s, {self.seconds} s, {self.ai_answers} AI answers at most"


@dataclass(frozen=True)
class Driven:
    """The results; `generator`: Locust's highest use of one processor (1.0: Locust was the limit)."""

    results: Results
    generator: float


def require_load(application: Application) -> None:
    """Raises OpsError if the environment has no requests for a load test."""
    if not application.load_test:
        raise OpsError(
            "[[application.load_test]] is not configured: a load test has no requests",
            "describe their requests (docs/application.md)",
        )


@action
def drive_load(application: Application, load: LoadRequest, directory: Path, sample: Callable[[], None]) -> Driven:
    """Run the load test, and call `sample` meanwhile. Locust's files stay in `directory`.

    Raises:
        OpsError: Locust is not installed, failed, was killed, did not end, or left no results.
    """
    directory.mkdir(parents=True, exist_ok=True)
    taken = list[float]()
    with (directory / LOG).open("wb") as log:
        with shell.spawn(
            _argv(application, load, directory),
            environment=_secrets(application, load),
            inherit=shell.NETWORK,
            directory=directory,
            stdout=log,
            stderr=log,
        ) as child:
            _wait(child, load, sample, taken)
        code = child.returncode
    if code:
        raise _failure(code, directory, secrets_of(application))
    results = read_results(directory)
    write_results(results, directory / TABLE)
    return Driven(results, max(taken, default=0.0))


def _argv(application: Application, load: LoadRequest, directory: Path) -> list[str | Path]:
    return [
        *LOCUST,
        "-f",
        USERS,
        "--headless",
        "--host",
        application.url.rstrip("/"),
        "--users",
        str(load.users),
        "--spawn-rate",
        str(load.spawn_rate),
        "--run-time",
        f"{load.seconds}s",
        "--csv",
        directory / "load",
        "--csv-full-history",
        "--json-file",
        directory / "load",
        "--stop-timeout",
        str(STOP_SECONDS),
        "--exit-code-on-error",
        "0",
        "--only-summary",
        "--loglevel",
        "WARNING",
    ]


def _secrets(application: Application, load: LoadRequest) -> Mapping[str, str]:
    return {
        "OPS_LOAD_STEPS": json.dumps([step.model_dump() for step in application.load_test]),
        "OPS_LOAD_VALUES": json.dumps(values_of(application)),
        "OPS_LOAD_AI_ANSWERS": str(load.ai_answers),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUTF8": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(USERS.parents[2]), os.environ.get("PYTHONPATH", "")))),
    }


def _wait(child: subprocess.Popen[bytes], load: LoadRequest, sample: Callable[[], None], taken: list[float]) -> None:
    process = _process(child.pid)

    def ended() -> bool:
        if child.poll() is not None:
            return True
        sample()
        if process:
            try:
                taken.append(process.cpu_percent(None) / 100)
            except psutil.Error:
                return child.poll() is not None
        return False

    most = load.seconds + load.users / load.spawn_rate + STOP_SECONDS + GRACE_SECONDS
    try:
        until(ended, what="the end of locust", seconds=most, every_seconds=0.5)
    except Unreachable:
        raise OpsError(f"locust did not end within {most:.0f} s", "run it again, with fewer users") from None


def _process(pid: int) -> psutil.Process | None:
    try:
        found = psutil.Process(pid)
        found.cpu_percent(None)  # counted from here
    except psutil.Error:
        return None
    return found


def _failure(code: int, directory: Path, secrets: Iterable[str]) -> OpsError:
    said = without((directory / LOG).read_text(errors="replace")[-LAST:], secrets)
    if "No module named locust" in said:
        return OpsError("locust is not installed", INSTALL)
    if code < 0:
        return OpsError(f"locust was ended by signal {-code}", f"see {directory / LOG}; perhaps it ran out of memory")
    return CommandFailed([os.path.basename(LOCUST[-1])], code, said, f"see {directory / LOG}")  # noqa: PTH119
