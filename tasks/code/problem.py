"""What a tool said of a piece of code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runbook.errors import OpsError
from tasks.application.worktree import inside

Severity = Literal["error", "warning"]
PYTHON = (".py", ".pyi")
WEB = (".ts", ".tsx", ".mts", ".cts", ".js", ".jsx", ".mjs", ".cjs")


@dataclass(frozen=True)
class Problem:
    """One place: `file` from the repository's top, `line` from 1 (0: the whole file), the tool's own code for it."""

    tool: str
    file: str
    line: int
    code: str
    message: str
    severity: Severity = "error"
    fixable: bool = False


@dataclass(frozen=True)
class Checked:
    """A tool's answer. `files` is how many it really looked at; `notes` is what else somebody should know."""

    tool: str
    version: str
    files: int
    problems: tuple[Problem, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        """Without warnings."""
        return sum(problem.severity == "error" for problem in self.problems)


def chosen_files(repository: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Those of the named files (from the repository's top) that have one of the suffixes.

    Raises:
        OpsError: one is not there, or is outside.
    """
    found = []
    for name in names:
        path = repository / name
        inside(repository, path)
        if not path.is_file():
            raise OpsError(f"there is no file {name} in {repository}", "name files from the repository's top directory")
        if path.suffix in suffixes:
            found.append(path)
    return found


def shown(repository: Path, path: str | Path) -> str:
    """A path as it stands in a report: from the repository's top where it is inside."""
    absolute = Path(path)
    return str(absolute.relative_to(repository)) if absolute.is_relative_to(repository) else str(absolute)
