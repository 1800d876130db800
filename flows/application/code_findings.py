"""What tools said of the application's code, as findings and tables (§3.3, §3.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.page.render import key
from runbook.report import Report, Status
from tasks.application.worktree import require_repository, uncommitted
from tasks.code.problem import Checked

SHOWN = 200


def ask(report: Report, name: str, question: Callable[[], Checked]) -> Checked | None:
    """A tool's answer; where there is none that is critical: what could not be checked is no pass."""
    try:
        return question()
    except OpsError as error:
        report.fail(name, error.hint, value=error.message, expected="an answer")
        return None


def the_repository(report: Report, env: Environment) -> Path:
    """The git checkout, with what stands in no commit told."""
    repository = require_repository(env.application.repository)
    changed = uncommitted(repository)
    report.fact("checkout", f"{repository}, {len(changed)} files with changes that no commit has")
    return repository


def the_workspace(env: Environment) -> Path:
    """
    Raises:
        OpsError: the environment names none, or it is not there.
    """
    web = Path(env.application.web_directory)
    if not env.application.web_directory:
        raise OpsError("the environment names no web_directory", "add it under [application], or leave its tools out")
    if not (web / "package.json").is_file():
        raise OpsError(f"there is no package.json in {web}", "correct [application] web_directory")
    return web


def judge(report: Report, checked: Checked, hint: str, *, otherwise: Status = Status.CRITICAL) -> None:
    """One finding of a tool's answer: errors as `otherwise` says, else warnings."""
    warnings = len(checked.problems) - checked.errors
    value = f"{checked.errors} errors, {warnings} warnings in {checked.files} files"
    report.require(
        checked.tool,
        not checked.problems,
        hint,
        value=value,
        expected="none",
        worst=otherwise if checked.errors else Status.WARN,
    )
    told = "; ".join((f"{checked.version}, {checked.files} files in {checked.seconds:.1f} s", *checked.notes))
    report.fact(checked.tool, told)


def show(report: Report, answers: Sequence[Checked]) -> None:
    """By file, by code, and one by one (the first ones)."""
    problems = [problem for checked in answers for problem in checked.problems]
    if not problems:
        return
    by_file = Counter((problem.file, problem.tool) for problem in problems)
    by_code = Counter((problem.tool, problem.code or "none") for problem in problems)
    report.table("By file", ("file", "tool", "problems"), [(*at, count) for at, count in by_file.most_common(50)])
    report.table("By code", ("tool", "code", "problems"), [(*of, count) for of, count in by_code.most_common(50)])
    columns = ("file", "line", "tool", "code", "what", "severity", "can be fixed by the tool")
    rows = [
        (found.file, found.line, found.tool, found.code, found.message, found.severity, "yes" if found.fixable else "")
        for found in problems[:SHOWN]
    ]
    report.table(f"Problems ({len(rows)} of {len(problems)})", columns, rows)


def evidence_path(report: Report, env: Environment, what: str) -> Path:
    """A place beside the reports for something that is too large for the page."""
    folder = env.reports_directory / "evidence"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"{report.started:%Y%m%dT%H%M%S%fZ}-{key(report)}-{what}"
