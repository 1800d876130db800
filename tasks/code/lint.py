"""Problems that ruff and ESLint find in the code, and their automatic fixes (§3.4). Only `repair` writes.

Source: https://docs.astral.sh/ruff/configuration/#command-line-interface, https://eslint.org/docs/latest/use/command-line-interface
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blocks.places import Application
from runbook.errors import OpsError, excerpt
from runbook.kinds import action, probe
from runbook.shell import Completed
from tasks.application.programs import answer, parsed, python_program, web_program
from tasks.code.problem import WEB, CheckedCode, Problem, Severity, shown

Linter = Literal["ruff", "ruff format", "eslint"]
_COUNTED = re.compile(r"(\d+) files? (?:would be reformatted|already formatted|left unchanged|reformatted)")


@dataclass(frozen=True)
class LintedCode:
    """The code to check: a checkout (live, or a worktree) with its backend and web directories, chosen files (none:
    all), chosen rules (none: as configured), and the time limit of a tool in seconds."""

    application: Application
    repository: Path
    backend: Path
    web: Path
    files: tuple[Path, ...] = ()
    python_rules: tuple[str, ...] = ()
    web_rules: tuple[str, ...] = ()
    seconds: float = 600

    def python_targets(self) -> list[Path]:
        return [path for path in self.files if path.suffix not in WEB] or [Path()]

    def web_targets(self) -> list[Path]:
        return [path for path in self.files if path.suffix in WEB] or [Path()]

    def ruff(self, *arguments: str | Path, accepted: Sequence[int] = (0, 1)) -> Completed:
        """Run ruff in the backend's directory."""
        program = python_program(self.application, "ruff")
        return answer([program, *arguments], self.backend, seconds=self.seconds, accepted=accepted)

    def eslint(self, *arguments: str | Path, accepted: Sequence[int] = (0, 1)) -> Completed:
        """Run ESLint in the workspace's directory."""
        return answer([web_program(self.web, "eslint"), *arguments], self.web, seconds=self.seconds, accepted=accepted)

    def rules_of_ruff(self) -> list[str]:
        return ["--select", ",".join(self.python_rules)] if self.python_rules else []

    def rules_of_eslint(self) -> list[str]:
        return [part for rule in self.web_rules for part in ("--rule", f"{rule}: error")]


@probe
def read_ruff(source: LintedCode) -> CheckedCode:
    """Run `ruff check`.

    Raises:
        OpsError: ruff is missing, hangs, refuses (an unknown rule), or its answer is invalid.
    """
    version, files = _ruff_version(source), _python_files(source)
    done = source.ruff(
        "check",
        "--no-cache",
        "--no-fix",
        "--output-format",
        "json",
        *source.rules_of_ruff(),
        "--",
        *source.python_targets(),
    )
    problems = _parse("ruff", done, lambda answer: [_of_ruff(source, one) for one in answer])
    _require_reason("ruff", done, problems)
    return CheckedCode("ruff", version, len(files), problems, done.seconds)


@probe
def read_ruff_format(source: LintedCode) -> CheckedCode:
    """Run `ruff format` without writing.

    Raises:
        OpsError: as `read_ruff`.
    """
    version = _ruff_version(source)
    done = source.ruff("format", "--no-cache", "--diff", "--", *source.python_targets())
    counted = sum(int(number) for number in _COUNTED.findall(done.stderr + done.stdout))
    if not counted:
        raise _unusable("ruff format", done)
    lines = done.stdout.splitlines()
    names = [
        line[4:] for line, after in itertools.pairwise(lines) if line.startswith("--- ") and after.startswith("+++ ")
    ]
    problems = tuple(
        Problem(
            "ruff format", shown(source.repository, source.backend / name), 0, "format", "not formatted", fixable=True
        )
        for name in names
    )
    _require_reason("ruff format", done, problems)
    return CheckedCode("ruff format", version, counted, problems, done.seconds)


@probe
def read_eslint(source: LintedCode) -> CheckedCode:
    """Run ESLint without its cache, which it then deletes. With chosen rules only their problems and parse errors are
    kept.

    Raises:
        OpsError: it is missing, hangs, refuses (an unknown rule, no configuration), or its answer is invalid.
    """
    version = source.eslint("--version").stdout.strip()
    done = source.eslint("--format", "json", *source.rules_of_eslint(), "--", *source.web_targets())
    results = parsed("eslint", done.stdout, list)
    if not results:
        raise OpsError("eslint checked no file", "check files and ignores in eslint.config.js")
    problems = _parse(
        "eslint", done, lambda answer: [_of_eslint(source, file, one) for file in answer for one in file["messages"]]
    )
    _require_reason("eslint", done, problems)
    kept = {*source.web_rules, "syntax"}
    chosen = tuple(found for found in problems if not source.web_rules or found.code in kept)
    return CheckedCode("eslint", version, len(results), chosen, done.seconds)


@probe
def read_ruff_settings(source: LintedCode) -> str:
    """The settings in force for the first file, printed by ruff."""
    return source.ruff("check", "--show-settings", *source.rules_of_ruff(), "--", _python_files(source)[0]).stdout


@probe
def read_eslint_settings(source: LintedCode, file: Path) -> str:
    """The settings in force for a file, as ESLint's JSON."""
    done = source.eslint("--print-config", file)
    parsed("eslint", done.stdout, dict)
    return done.stdout


@action(idempotent=True)
def repair(source: LintedCode, linters: Sequence[Linter]) -> None:
    """Write the safe automatic fixes. Only for a worktree: the live checkout is only read.

    Raises:
        OpsError: one of them failed.
    """
    if "ruff" in linters:
        source.ruff("check", "--no-cache", "--fix", "--quiet", *source.rules_of_ruff(), "--", *source.python_targets())
    if "ruff format" in linters:
        source.ruff("format", "--no-cache", "--quiet", "--", *source.python_targets())
    if "eslint" in linters:
        source.eslint("--fix", *source.rules_of_eslint(), "--", *source.web_targets())


def _ruff_version(source: LintedCode) -> str:
    version = source.ruff("--version").stdout.strip()
    if not version.startswith("ruff "):
        raise OpsError(f"ruff reports its version as “{excerpt(version)}”", "check which program is installed as ruff")
    return version


def _python_files(source: LintedCode) -> list[Path]:
    """The files that ruff checks.

    Raises:
        OpsError: there is none.
    """
    done = source.ruff("check", "--show-files", "--", *source.python_targets())
    files = [Path(line) for line in done.stdout.splitlines() if line.startswith("/")]
    if not files:
        raise OpsError("ruff checked no file", "check include and exclude in its settings")
    return files


def _of_ruff(source: LintedCode, one: dict[str, Any]) -> Problem:
    file, line = shown(source.repository, one["filename"]), int(one["location"]["row"])
    safe = bool(one["fix"]) and one["fix"]["applicability"] == "safe"
    return Problem("ruff", file, line, str(one["code"] or "syntax"), str(one["message"]), fixable=safe)


def _of_eslint(source: LintedCode, file: dict[str, Any], one: dict[str, Any]) -> Problem:
    severity: Severity = "error" if one["severity"] == 2 else "warning"
    line, rule = int(one.get("line") or 0), str(one["ruleId"] or "syntax")
    name = shown(source.repository, file["filePath"])
    return Problem("eslint", name, line, rule, str(one["message"]), severity, bool(one.get("fix")))


def _parse(name: str, done: Completed, read: Callable[[list[Any]], list[Problem]]) -> tuple[Problem, ...]:
    """Parse a tool's JSON.

    Raises:
        OpsError: it has not the documented format.
    """
    try:
        return tuple(read(parsed(name, done.stdout, list)))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _unusable(name, done) from None


def _require_reason(name: str, done: Completed, problems: Sequence[Problem]) -> None:
    """An exit code for problems without any problem is an invalid answer."""
    if done.code and not problems:
        raise _unusable(name, done)


def _unusable(name: str, done: Completed) -> OpsError:
    return OpsError(
        f"{name} exited {done.code} and printed {excerpt(done.stdout + done.stderr)}",
        f"run {name} by hand: without a valid answer the check has not passed",
    )
