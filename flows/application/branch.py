"""A branch made in a worktree: its diff and its test results in the report."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from blocks.environment import Environment
from flows.application.code_findings import evidence_path
from runbook.masking import without_logins
from runbook.page.markdown import fenced
from runbook.page.render import key
from runbook.report import Evidence, Report
from tasks.application.worktree import Worktree
from tasks.code.suite import Suite, backend_suite, run_suite, web_suite

SHOWN_LINES, LAST_LINES = 200, 40


def report_branch(report: Report, env: Environment, tree: Worktree) -> None:
    """The branch, its commit, and its diff: complete as a file in the report folder, its beginning on the page."""
    patch = tree.diff()
    path = evidence_path(report, env, "branch.patch")
    path.write_text(patch, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o600)
    lines = patch.splitlines()
    more = f"\n… {len(lines) - SHOWN_LINES:,} more lines in {path}" if len(lines) > SHOWN_LINES else ""
    text = fenced("\n".join(lines[:SHOWN_LINES]) + more, "diff")
    report.attach(Evidence("Diff", text=text))
    report.fact("branch", f"{tree.branch}, {tree.head()[:12]}: git merge {tree.branch}, or git branch -D {tree.branch}")
    report.fact("patch", path)


def run_branch_tests(
    report: Report,
    env: Environment,
    tree: Worktree,
    seconds: float,
    *,
    python: Path | None = None,
    parts: Collection[str] = ("backend", "web"),
) -> None:
    """Run the application's tests in the worktree, the backend's by `python` (default: the application's Python)."""
    application = env.application
    if "backend" in parts:
        judge_suite(
            report,
            env,
            backend_suite(application, tree.at(application.source), python or Path(application.need("python"))),
            seconds,
        )
    if "web" in parts and application.web_directory:
        web = tree.at(Path(application.web_directory))
        judge_suite(report, env, web_suite("web tests", application, application.web_test_command, web), seconds)


def judge_suite(report: Report, env: Environment, suite: Suite, seconds: float) -> None:
    """Run a test suite: a failure is CRITICAL, a missing suite is WARN."""
    if not suite.command:
        report.warn(
            suite.name,
            "configure them in [application] of the environment's TOML: without tests the branch is not proven",
            value="none are configured",
        )
        return
    tested = run_suite(suite, seconds)
    saved = save_evidence(report, env, f"{suite.name}.txt", tested.output)
    if not tested.passed and tested.output:
        last = "\n".join(tested.output.splitlines()[-LAST_LINES:])
        report.attach(Evidence(f"End of {suite.name}", text=fenced(last)))
    report.require(
        suite.name,
        tested.passed,
        f"read {saved}; the branch is kept, nothing was merged",
        value=tested.text,
        expected="all pass",
    )


def save_evidence(report: Report, env: Environment, name: str, text: str) -> Path:
    """Write a file into this run's evidence folder, readable by this user only."""
    folder = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%S%fZ}-{key(report)}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / re.sub(r"[^A-Za-z0-9.-]+", "-", name)
    path.touch(mode=0o600)
    path.write_text(without_logins(text), encoding="utf-8", errors="backslashreplace")
    report.fact("evidence", folder)
    return path
