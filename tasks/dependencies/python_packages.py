"""Packages of the backend's Python environment, read by pip. Nothing is installed there."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runbook import shell
from runbook.errors import CommandFailed, OpsError, excerpt
from runbook.kinds import probe
from tasks.application.programs import PYTHON_VARIABLES, answer, find_program, parsed
from tasks.dependencies.form import known_form
from tasks.dependencies.versions import Outdated, Package

# One attempt each: otherwise an unreachable index costs minutes.
PATIENCE = {"PIP_RETRIES": "0", "PIP_TIMEOUT": "30", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
_NO_CONFLICTS = "No broken requirements found"
_NO_ANSWER = re.compile(r"Could not fetch URL \S*/([^/\s]+)/?: (.*?)(?: for url: .*)?(?: - skipping)?$", re.MULTILINE)


@dataclass(frozen=True)
class Newer:
    """Packages with a newer version, and packages without an answer of the index: they can be outdated too."""

    found: tuple[Outdated, ...]
    not_known: tuple[str, ...]


def pip(python: Path, *arguments: str | Path, seconds: float, accepted: Sequence[int] = (0,)) -> shell.Completed:
    """Run this worker's pip on another Python's environment, which may have no pip.

    Raises:
        OpsError: pip failed, hung or is missing.
    """
    program = find_program("pip", Path(sys.executable).parent)
    return answer(
        [program, "--python", python, *arguments],
        Path("/"),
        seconds=seconds,
        accepted=accepted,
        environment=PATIENCE,
        inherit=PYTHON_VARIABLES,
    )


@probe
def list_python(python: Path, seconds: float) -> tuple[Package, ...]:
    """The installed packages.

    Raises:
        OpsError: pip gave no answer.
    """
    rows = parsed("pip list", pip(python, "list", "--format", "json", seconds=seconds).stdout, list)
    with known_form("pip list"):
        return tuple(Package(str(row["name"]), str(row["version"])) for row in rows)


@probe
def find_outdated_python(python: Path, seconds: float) -> Newer:
    """Newer versions. If its index is unreachable, pip prints an empty list and exits 0; only its log shows it.

    Raises:
        OpsError: pip gave no answer.
    """
    with tempfile.TemporaryDirectory(prefix="ops-pip-") as folder:
        log = Path(folder, "log")
        done = pip(python, "--log", log, "list", "--outdated", "--format", "json", seconds=seconds)
        rows = parsed("pip list --outdated", done.stdout, list)
        if not log.exists():
            raise OpsError("pip wrote no log, so it is not known whether its index answered", "run pip by hand")
        logged = log.read_text(encoding="utf-8", errors="replace")
    with known_form("pip list --outdated"):
        found = tuple(Outdated(row["name"], row["version"], row["latest_version"]) for row in rows)
    missed = {name: _missed(why) for name, why in _NO_ANSWER.findall(logged)}
    return Newer(found, tuple(f"{name} ({why})" for name, why in sorted(missed.items())))


def _missed(why: str) -> str:
    """The meaning of pip's error. An HTTP status starts the text; elsewhere a port or a path can contain its digits."""
    return "not in the index" if why.startswith("404 ") else "no answer"


@probe
def find_python_conflicts(python: Path, seconds: float) -> tuple[str, ...]:
    """The conflicts that `pip check` reports.

    Raises:
        OpsError: pip gave no answer.
    """
    return conflicts_in(pip(python, "check", seconds=seconds, accepted=(0, 1)))


def conflicts_in(checked: shell.Completed) -> tuple[str, ...]:
    """The conflicts in the output of `pip check`.

    Raises:
        OpsError: it reported neither conflicts nor that there are none.
    """
    lines = [line.strip() for line in checked.stdout.splitlines() if line.strip()]
    if not lines or (not checked.code and _NO_CONFLICTS not in checked.stdout):
        raise OpsError(f"pip check gave no answer: {excerpt(checked.stdout + checked.stderr, -200)}", "run it by hand")
    return tuple(lines) if checked.code else ()


def versions_of(python: Path, name: str, seconds: float) -> list[str]:
    """Every version of a package in the index for this Python.

    Raises:
        OpsError: the index gave no answer, or has no version.
    """
    if name.startswith("-"):
        raise OpsError(f"“{name[:40]}” is no package", "correct its name")
    try:
        done = pip(python, "index", "versions", name, seconds=seconds)
    except CommandFailed as error:
        raise OpsError(
            f"the index returns no versions of {name}: {error.message}", "check pip's index: pip index versions"
        ) from None
    return _listed(done, "Available versions:", "pip index versions")


def dependents_of(python: Path, name: str, seconds: float) -> tuple[str, ...]:
    """The installed packages that require this one, by `pip show`.

    Raises:
        OpsError: it is not installed.
    """
    done = pip(python, "show", name, seconds=seconds)
    return tuple(_listed(done, "Required-by:", "pip show"))


def _listed(done: shell.Completed, head: str, command: str) -> list[str]:
    """The comma-separated values after `head`.

    Raises:
        OpsError: no line starts with `head`, which does not mean an empty list.
    """
    lines = [line.removeprefix(head) for line in done.stdout.splitlines() if line.startswith(head)]
    if not lines:
        raise OpsError(f"{command} gave no answer: {excerpt(done.stdout + done.stderr)}", "run it by hand")
    return [one.strip() for one in lines[0].split(",") if one.strip()]
