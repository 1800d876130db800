"""Answers of linters and type checkers as findings and tables (§3.3, §3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.page.render import key
from runbook.report import Report, Status
from tasks.application.worktree import require_repository, uncommitted
from tasks.code.problem import CheckedCode


def ask(report: Report, name: str, question: Callable[[], CheckedCode]) -> CheckedCode | None:
    """A tool's answer; CRITICAL without one: code that was not checked has not passed."""
    try:
        return question()
    except OpsError as error:
        report.fail(name, error.hint, value=error.message, expected="an answer")
        return None


def checkout_of(report: Report, env: Environment) -> Path:
    """The application's git checkout. The report states how many files have uncommitted changes."""
    repository = require_repository(env.application.repository)
    report.fact("checkout", f"{repository}, {len(uncommitted(repository))} files with uncommitted changes")
    return repository


def workspace_of(env: Environment) -> Path:
    """The web application's directory.

    Raises:
        OpsError: the environment names none, or it does not exist.
    """
    web = Path(env.application.web_directory)
    if not env.application.web_directory:
        raise OpsError(
            "the environment names no web_directory", "add it under [application], or do not choose the web tools"
        )
    if not (web / "package.json").is_file():
        raise OpsError(f"there is no package.json in {web}", "correct [application] web_directory")
    return web


def judge(report: Report, checked: CheckedCode, hint: str, *, worst: Status = Status.CRITICAL) -> None:
    """One finding for a tool: errors are `worst`, warnings are WARN."""
    warnings = len(checked.problems) - checked.errors
    value = f"{checked.errors} errors, {warnings} warnings in {checked.files} files"
    report.require(
        checked.tool,
        not checked.problems,
        hint,
        value=value,
        expected="none",
        worst=worst if checked.errors else Status.WARN,
    )
    run = f"{checked.version}, {checked.files} files in {checked.seconds:.1f} s"
    report.fact(checked.tool, "; ".join((run, *checked.notes)))


def attach_problems(report: Report, answers: Sequence[CheckedCode]) -> None:
    """Tables of the problems: by file, by code, and one by one."""
    problems = [problem for checked in answers for problem in checked.problems]
    if not problems:
        return
    by_file = Counter((problem.file, problem.tool) for problem in problems)
    by_code = Counter((problem.tool, problem.code or "none") for problem in problems)
    report.table(
        "By file", ("file", "tool", "problems"), [(*at, count) for at, count in by_file.most_common()], most=50
    )
    report.table(
        "By code", ("tool", "code", "problems"), [(*of, count) for of, count in by_code.most_common()], most=50
    )
    columns = ("file", "line", "tool", "code", "problem", "severity", "fixable by the tool")
    rows = [
        (found.file, found.line, found.tool, found.code, found.message, found.severity, "yes" if found.fixable else "")
        for found in problems
    ]
    report.table(f"Problems ({len(problems):,})", columns, rows)


def evidence_path(report: Report, env: Environment, what: str) -> Path:
    """A path in the report folder for evidence that is too large for the page."""
    folder = env.reports_directory / "evidence"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"{report.started:%Y%m%dT%H%M%S%fZ}-{key(report)}-{what}"
