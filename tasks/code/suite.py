"""The application's own tests, run where its code was changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application
from runbook.errors import CommandFailed, OpsError, excerpt
from runbook.kinds import action
from tasks.programs import answer, find_program


@dataclass(frozen=True)
class Tested:
    """How a suite of tests ended; `told` is its last words."""

    suite: str
    passed: bool
    told: str
    seconds: float = 0.0


@action(idempotent=True)
def run_tests(application: Application, backend: Path, web: Path, seconds: float) -> list[Tested]:
    """Run pytest where the backend has tests, and `pnpm test` where the workspace has such a script; none where there
    is neither. Both write where they are run: in a worktree."""
    found = []
    if (backend / "tests").is_dir():
        argv = [application.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Before what is installed, which may lead back to the live sources (pip install -e).
        here = {"PYTHONPATH": os.pathsep.join(map(str, (backend / "src", backend)))}
        found.append(_tested("pytest", argv, backend, seconds, here))
    if "test" in _scripts(web):
        try:
            found.append(_tested("pnpm test", [str(find_program("pnpm")), "test"], web, seconds))
        except OpsError as error:
            found.append(Tested("pnpm test", False, str(error)))
    return found


def _tested(
    suite: str, argv: list[str], directory: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> Tested:
    try:
        said = answer(argv, directory, seconds=seconds, accepted=range(256), environment=environment)
    except (CommandFailed, OpsError) as error:
        return Tested(suite, False, str(error))
    lines = [line.strip() for line in (said.stdout + said.stderr).splitlines() if line.strip()]
    return Tested(suite, said.code == 0, excerpt(" / ".join(lines[-3:]), -300), said.seconds)


def _scripts(web: Path) -> dict[str, str]:
    try:
        scripts = json.loads((web / "package.json").read_text(encoding="utf-8"))["scripts"]
    except (OSError, ValueError, KeyError):
        return {}
    return scripts if isinstance(scripts, dict) else {}
