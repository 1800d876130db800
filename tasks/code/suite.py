"""Run the application's own tests and its build in the worktree with the changed code: they write there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blocks.places import Application
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import action
from tasks.application.programs import NODE_VARIABLES, answer

_FAILS = re.compile(r"^\s*(?:FAILED |ERROR[: ]|FAIL: |not ok |✖ |× )\S.*", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """A command and its directory; without a `command` there is nothing to run."""

    name: str
    command: Sequence[str]
    directory: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    inherit: Sequence[str] = ()


@dataclass(frozen=True)
class Tested:
    """The result of a suite. `text`: the result, with the names of failed tests; `output`: the complete output."""

    passed: bool
    text: str
    output: str = ""


def backend_suite(application: Application, backend: Path, python: Path) -> Suite:
    """`test_command`, else pytest if the backend has `tests/`; in the environment of `python`."""
    command: Sequence[str] = application.test_command
    if not command and (backend / "tests").is_dir():
        command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    variables = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "VIRTUAL_ENV": str(python.parent.parent),
        # Before the installed packages, which can point to the live sources (pip install -e).
        "PYTHONPATH": os.pathsep.join(map(str, (backend / "src", backend))),
    }
    return Suite("backend tests", command, backend, variables, (*shell.NETWORK, *application.inherit))


def web_suite(name: str, application: Application, command: Sequence[str], web: Path) -> Suite:
    """A command of the workspace; a pnpm script only if package.json has it."""
    missing = len(command) == 2 and command[0] == "pnpm" and command[1] not in _scripts(web)
    return Suite(name, () if missing else command, web, {"CI": "true"}, (*NODE_VARIABLES, *application.inherit))


@action(idempotent=True)
def run_suite(suite: Suite, seconds: float) -> Tested:
    """Run a suite; one that hangs or is missing has not passed."""
    try:
        done = answer(
            suite.command,
            suite.directory,
            seconds=seconds,
            accepted=range(256),
            environment=suite.variables,
            inherit=suite.inherit,
        )
    except OpsError as error:
        return Tested(False, error.message)
    output = done.stdout + done.stderr
    if not done.code:
        return Tested(True, f"passed in {done.seconds:.0f} s", output)
    failing = [line.strip() for line in _FAILS.findall(output)]
    return Tested(False, f"failed: {'; '.join(failing[:5]) or f'exit code {done.code}'}", output)


def _scripts(web: Path) -> dict[str, str]:
    try:
        scripts = json.loads((web / "package.json").read_text(encoding="utf-8"))["scripts"]
    except (OSError, ValueError, KeyError):
        return {}
    return scripts if isinstance(scripts, dict) else {}
