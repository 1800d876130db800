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
    """A problem in the code. `file`: from the repository's top; `line`: from 1, 0 for the whole file; `code`: the
    tool's."""

    tool: str
    file: str
    line: int
    code: str
    message: str
    severity: Severity = "error"
    fixable: bool = False


@dataclass(frozen=True)
class CheckedCode:
    """A tool's answer. `files`: the number of files that it checked; `notes`: other remarks."""

    tool: str
    version: str
    files: int
    problems: tuple[Problem, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        """The number of errors, without warnings."""
        return sum(problem.severity == "error" for problem in self.problems)


def chosen_files(repository: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The named files (from the repository's top) with one of the suffixes.

    Raises:
        OpsError: a file does not exist, or is outside the repository.
    """
    found = []
    for name in names:
        path = repository / name
        inside(repository, path)
        if not path.is_file():
            raise OpsError(
                f"there is no file {name} in {repository}", "enter files relative to the repository's top directory"
            )
        if path.suffix in suffixes:
            found.append(path)
    return found


def shown(repository: Path, path: str | Path) -> str:
    """A path for a report: relative to the repository's top if it is inside."""
    absolute = Path(path)
    return str(absolute.relative_to(repository)) if absolute.is_relative_to(repository) else str(absolute)
