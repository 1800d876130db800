"""Linting the application's code (§3.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.application.branch import report_branch, run_branch_tests
from flows.application.code_findings import ask, attach_problems, checkout_of, evidence_path, judge, workspace_of
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.worktree import git, link_packages, worktree
from tasks.code.lint import (
    LintedCode,
    Linter,
    read_eslint,
    read_eslint_settings,
    read_ruff,
    read_ruff_format,
    read_ruff_settings,
    repair,
)
from tasks.code.problem import PYTHON, WEB, CheckedCode, chosen_files

Rule = Annotated[str, Field(pattern=r"^[A-Za-z@][A-Za-z0-9@/_-]*$")]


@flow(name="lint-code", flow_run_name=RunName("lint-code {environment} {tools}"))
def lint_code(
    environment: str,
    tools: tuple[Linter, ...] = ("ruff", "ruff format", "eslint"),
    files: list[str] = [],  # noqa: B006 — only read
    python_rules: list[Rule] = [],  # noqa: B006
    web_rules: list[Rule] = [],  # noqa: B006
    fix: bool = False,
    seconds: Annotated[int, Field(ge=1, le=7200)] = 600,
) -> Report:
    """Lint実行 (§3.4)

    Runs ruff (check and format) and ESLint on the application's checkout: on all files or chosen ones, with the
    configured or with chosen rules. Run it before a release, or when CI rejects a branch. Evidence: the problems, and
    the settings in force.

    With `fix` the tools repair what they can in a git worktree and commit it to a new branch. The application's tests
    run there. The report has the diff and the problems that are left. The live checkout is not changed, except that
    ESLint's cache is deleted (its next run is a full one). To undo: delete the branch.

    Departs from the manual: `--fix` does not run in the live checkout. The ESLint command that the manual calls “clear
    the cache” creates one.

    Args:
        environment: Environment (lab, staging, production …)
        tools: Tools
        files: Files, from the repository's root. Empty: all
        python_rules: Rules of ruff (e.g. F401). Empty: as configured
        web_rules: Rules of ESLint (e.g. no-var). Empty: as configured
        fix: Fix automatically on a separate branch (git worktree), and commit
        seconds: Time limit of each tool, in seconds
    """
    env = Environment.find(environment)
    with runbook("Lint code", env) as report:
        repository, application = checkout_of(report, env), env.application
        chosen = tuple(chosen_files(repository, files, (*PYTHON, *WEB)))
        wanted = _wanted(tools, chosen)
        web = workspace_of(env) if "eslint" in wanted else repository
        source = LintedCode(
            application, repository, application.source, web, chosen, tuple(python_rules), tuple(web_rules), seconds
        )
        cache = web / ".eslintcache"
        cached = cache.exists()
        answers = _run_tools(report, source, wanted)
        if cached and not cache.exists():
            report.fact("ESLint's cache", "deleted")
        attach_problems(report, answers)
        attach_settings(report, env, source, wanted)
        found = sum(len(checked.problems) for checked in answers)
        report.outcome = f"{found} problems in {sum(checked.files for checked in answers)} files"
        if fix and found:
            _fix(report, env, source, wanted)
    return report


def _wanted(tools: Sequence[Linter], chosen: Sequence[Path]) -> list[Linter]:
    """The tools that have a file to check."""
    fitting = {"eslint": WEB, "ruff": PYTHON, "ruff format": PYTHON}
    wanted = [
        tool for tool in dict.fromkeys(tools) if not chosen or any(path.suffix in fitting[tool] for path in chosen)
    ]
    if not wanted:
        raise OpsError("none of the chosen tools checks any of the chosen files", "choose matching tools and files")
    return wanted


def _run_tools(report: Report, source: LintedCode, wanted: Sequence[Linter], when: str = "") -> list[CheckedCode]:
    """The answers of all tools, judged."""
    questions: dict[Linter, Callable[[], CheckedCode]] = {
        "ruff": lambda: read_ruff(source),
        "ruff format": lambda: read_ruff_format(source),
        "eslint": lambda: read_eslint(source),
    }
    answers = [found for tool in wanted if (found := ask(report, tool + when, questions[tool]))]
    for checked in answers:
        hint = "fix the rest by hand" if when else "run this with fix, or fix the problems by hand"
        judge(report, replace(checked, tool=checked.tool + when), hint, worst=Status.WARN)
    return answers


def _fix(report: Report, env: Environment, source: LintedCode, wanted: Sequence[Linter]) -> None:
    """Repair on a branch, commit, check again, run the tests."""
    branch = f"ops/lint-{report.started:%Y%m%d-%H%M%S}"
    with worktree(source.repository, branch) as tree:
        if env.application.web_directory:
            link_packages(tree, Path(env.application.web_directory))
        there = replace(
            source,
            repository=tree.directory,
            backend=tree.at(source.backend),
            web=tree.at(source.web),
            files=tuple(map(tree.at, source.files)),
        )
        repair(there, wanted)
        changed = tree.changed()
        if not tree.commit("Lint: automatic fixes of ruff and ESLint"):
            report.warn("fix", "fix the problems by hand", value="the tools could repair none of them")
            return
        answers = _run_tools(report, there, wanted, " after the fix")
        left = sum(len(checked.problems) for checked in answers)
        run_branch_tests(report, env, tree, source.seconds)
        report_branch(report, env, tree)
        report.outcome += f"; {len(changed)} files repaired on {branch}, {left} problems left"


_SETTING = re.compile(
    r"^(linter\.line_length|formatter\.\w+|linter\.unresolved_target_version|linter\.preview) = (\S+)$"
)
_RULE = re.compile(r"^\t\S+ \(([A-Z]+[0-9]+)\),$")


def attach_settings(report: Report, env: Environment, source: LintedCode, wanted: Sequence[Linter]) -> None:
    """The main settings on the page, all of them as files in the report folder; WARN if a tool does not print them."""
    rows = list[tuple[str, str, str]]()
    try:
        if "ruff" in wanted or "ruff format" in wanted:
            text = read_ruff_settings(source)
            rows += [("ruff", *_save(report, env, "ruff-settings.txt", text)), *_of_ruff(text)]
        if "eslint" in wanted and (file := _web_file(source)):
            text = read_eslint_settings(source, file)
            rows += [("eslint", *_save(report, env, "eslint-settings.json", text)), *_of_eslint(text)]
    except OpsError as error:
        report.warn("settings in force", error.hint, value=error.message)
    report.table("Settings in force", ("tool", "setting", "value"), rows)


def _save(report: Report, env: Environment, name: str, text: str) -> tuple[str, str]:
    path = evidence_path(report, env, name)
    path.write_text(text, encoding="utf-8")
    return "all of them", str(path)


def _of_ruff(text: str) -> list[tuple[str, str, str]]:
    lines = text.splitlines()
    enabled = text.partition("linter.rules.enabled = [")[2].partition("\n]")[0]
    rules = [found[1] for line in enabled.splitlines() if (found := _RULE.match(line))]
    named = [("ruff", found[1], found[2]) for line in lines if (found := _SETTING.match(line))]
    return [
        ("ruff", "rules enabled", f"{len(rules)}: {', '.join(rules[:80])}{' …' if len(rules) > 80 else ''}"),
        *named,
    ]


def _of_eslint(text: str) -> list[tuple[str, str, str]]:
    rules = json.loads(text).get("rules", {})
    on = sorted(
        name for name, value in rules.items() if (value[0] if isinstance(value, list) else value) not in (0, "off")
    )
    return [("eslint", "rules enabled", f"{len(on)}: {', '.join(on[:80])}{' …' if len(on) > 80 else ''}")]


def _web_file(source: LintedCode) -> Path | None:
    """A file that ESLint checks: a chosen one, else one of the checkout."""
    chosen = [path for path in source.files if path.suffix in WEB]
    known = (source.web / name for name in git(source.web, "ls-files", "-z").split("\0"))
    return next((path for path in (*chosen, *known) if path.suffix in (".tsx", ".ts", ".js")), None)
