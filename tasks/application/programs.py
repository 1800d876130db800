"""The application's own tools: find and run them. A tool without an answer raises OpsError, which flows report as a
finding."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from blocks.places import Application
from runbook import shell
from runbook.errors import CommandFailed, OpsError, excerpt

INSTALL = {
    "mypy": "install it into the backend's environment: pip install mypy",
    "pip-audit": "install it into this worker's environment: pip install pip-audit",
    "ruff": "install it into the backend's environment: pip install ruff",
    "pre-commit": "run pip install pre-commit",
    "tsc": "add typescript to the workspace's devDependencies, then pnpm install",
    "eslint": "add eslint to the workspace's devDependencies, then pnpm install",
    "pnpm": "run npm install --global pnpm, in the version of packageManager in package.json",
    "node": "install Node.js 20 or newer (Debian: apt install nodejs)",
    "npm": "install npm, which comes with Node.js (Debian: apt install npm)",
    "git": "run apt install git",
}


GIT_VARIABLES = (*shell.NETWORK, *shell.SSH, "GIT_*")
PYTHON_VARIABLES = (*shell.NETWORK, "PIP_*", "UV_*", "PYTHONUTF8")
NODE_VARIABLES = (*shell.NETWORK, "NODE_*", "npm_config_*", "NPM_*", "PNPM_*", "COREPACK_*", "YARN_*")
PACKAGE_VARIABLES = (*PYTHON_VARIABLES, *NODE_VARIABLES, *GIT_VARIABLES, "PRE_COMMIT_*")
"""Variables of this worker that these programs need to reach their indexes and registries."""


def find_program(name: str, *first: Path, last: Sequence[Path] = ()) -> Path:
    """Find a program: in the directories `first`, then on PATH, then in `last`.

    Raises:
        OpsError: it is in none of them.
    """
    path = os.pathsep.join([*map(str, first), os.environ.get("PATH", ""), *map(str, last)])
    if found := shutil.which(name, path=path):
        return Path(found).absolute()
    raise OpsError(f"{name} is not installed", INSTALL.get(name, "install it"))


def python_program(application: Application, name: str) -> Path:
    """A program of the backend's environment, else on PATH, else of this worker's environment."""
    own = [Path(application.python).parent] if application.python else []
    return find_program(name, *own, last=[Path(sys.executable).parent])


def web_program(web: Path, name: str) -> Path:
    """A program of the workspace's packages. It needs node on PATH."""
    find_program("node")
    try:
        return find_program(name, web / "node_modules" / ".bin")
    except OpsError:
        if (web / "node_modules").is_dir():
            raise
        raise OpsError(
            f"{name} is not installed: {web} has no node_modules",
            "run reinstall-dependencies with parts=web, or pnpm install there",
        ) from None


def answer(
    argv: Sequence[str | Path],
    directory: Path,
    *,
    seconds: float,
    accepted: Collection[int] = (0,),
    environment: Mapping[str, str] | None = None,
    inherit: Collection[str] = (),
) -> shell.Completed:
    """Run a tool for at most `seconds`; `inherit`: see `shell.run`.

    Raises:
        OpsError: it failed, hung (its processes are ended), or is missing; the message starts with its name.
    """
    name = Path(argv[0]).name
    plain = {"NO_COLOR": "1", "FORCE_COLOR": "0", "LC_ALL": "C.UTF-8"}
    try:
        return shell.run(
            argv,
            directory=directory,
            environment={**plain, **(environment or {})},
            inherit=("NODE_OPTIONS", *inherit),
            timeout_seconds=seconds,
            accepted=accepted,
            hint=f"run {name} in {directory} by hand, or increase seconds",
        )
    except CommandFailed as error:
        if error.exit_code == 127:
            raise OpsError(f"{name} could not be started: {error.message}", INSTALL["node"]) from None
        raise


def parsed(name: str, text: str, kind: type) -> Any:
    """Parse a tool's JSON.

    Raises:
        OpsError: it is no JSON, or not of the type `kind`.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise OpsError(
            f"{name} printed no valid JSON: {excerpt(text)}",
            f"run {name} by hand: without a valid answer the check has not passed",
        )
    return found
