"""What a branch that was made in a worktree is told with: its difference, and the tests that were run there."""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.application.code_findings import evidence_path
from runbook.report import Evidence, Report, Status
from tasks.code.suite import run_tests
from tasks.worktree import Worktree

SHOWN_LINES = 200


def keep_branch(report: Report, env: Environment, tree: Worktree) -> None:
    """The branch, its commit, and the whole difference: a file beside the reports, its beginning on the page."""
    patch = tree.diff()
    path = evidence_path(report, env, "branch.patch")
    path.write_text(patch, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o600)
    lines = patch.splitlines()
    more = f"\n… {len(lines) - SHOWN_LINES} lines more in {path}" if len(lines) > SHOWN_LINES else ""
    text = "````diff\n" + "\n".join(lines[:SHOWN_LINES]) + more + "\n````"
    report.attach(Evidence("Difference", text=text))
    report.fact("branch", f"{tree.branch}, {tree.head()[:12]}: git merge {tree.branch}, or git branch -D {tree.branch}")
    report.fact("patch", path)


def show_tests(report: Report, env: Environment, tree: Worktree, seconds: float) -> bool:
    """Run the application's tests in the worktree. Where there are none that is told, and is no pass."""
    application = env.application
    backend = tree.at(application.source)
    web = tree.at(Path(application.web_directory)) if application.web_directory else backend
    tested = run_tests(application, backend, web, seconds)
    for suite in tested:
        report.expect(f"{suite.suite} on the branch", suite.passed, "look at the branch: do not merge it as it is",
                      value=suite.told, expected="passes")  # fmt: skip
    if not tested:
        report.expect("tests on the branch", False, "review the difference: nothing else vouches for it",
                      value="the application has none", otherwise=Status.WARN)  # fmt: skip
    return bool(tested) and all(suite.passed for suite in tested)
