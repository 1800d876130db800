"""Linting the application's code (§3.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.application.branch import keep_branch, prove_branch
from flows.application.code_findings import ask, evidence_path, judge, show, the_repository, the_workspace
from runbook.errors import OpsError
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.application.worktree import bring_packages, git, worktree
from tasks.code.lint import (
    Linter,
    Source,
    read_eslint,
    read_eslint_settings,
    read_ruff,
    read_ruff_format,
    read_ruff_settings,
    repair,
)
from tasks.code.problem import PYTHON, WEB, Checked, chosen_files

Rule = Annotated[str, Field(pattern=r"^[A-Za-z@][A-Za-z0-9@/_-]*$")]


@flow(name="lint-code", flow_run_name="lint-code {environment}")
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

    Asks ruff (check and format) and ESLint of the application's checkout, about everything or about chosen files, with
    the configured or with chosen rules; the settings in force are evidence. Run it before a release, or when a branch
    does not pass.

    With `fix` they repair what they can on a branch of its own in a git worktree, which is committed; the application's
    tests run there, the report has the difference, and tells what could not be repaired. The live checkout is never
    written to; only ESLint's cache there is dropped (its next run is from the start). To undo: delete the branch.

    Departs from the manual: `--fix` is not run in the live checkout, and the ESLint command that the manual calls
    “clear the cache” makes one.

    Args:
        environment: 対象の環境
        tools: 使うツール
        files: 対象のファイル (リポジトリの最上位から)。空ならすべて
        python_rules: ruff のルール (例 F401)。空なら設定どおり
        web_rules: ESLint のルール (例 no-var)。空なら設定どおり
        fix: 専用ブランチ (git worktree) で自動修正してコミットする
        seconds: 各ツールの制限時間 (秒)
    """
    env = Environment.find(environment)
    with runbook("Lint code", env) as report:
        repository, application = the_repository(report, env), env.application
        chosen = tuple(chosen_files(repository, files, (*PYTHON, *WEB)))
        wanted = _wanted(tools, chosen)
        web = the_workspace(env) if "eslint" in wanted else repository
        source = Source(
            application, repository, application.source, web, chosen, tuple(python_rules), tuple(web_rules), seconds
        )
        cache = web / ".eslintcache"
        cached = cache.exists()
        answers = _asked(report, source, wanted)
        if cached and not cache.exists():
            report.fact("ESLint's cache", "dropped")
        show(report, answers)
        show_settings(report, env, source, wanted)
        found = sum(len(checked.problems) for checked in answers)
        report.outcome = f"{found} problems in {sum(checked.files for checked in answers)} files"
        if fix and found:
            _fix(report, env, source, wanted)
    return report


def _wanted(tools: Sequence[Linter], chosen: Sequence[Path]) -> list[Linter]:
    """The tools that have something to look at."""
    fitting = {"eslint": WEB, "ruff": PYTHON, "ruff format": PYTHON}
    wanted = [
        tool for tool in dict.fromkeys(tools) if not chosen or any(path.suffix in fitting[tool] for path in chosen)
    ]
    if not wanted:
        raise OpsError("none of the tools has a file to look at", "choose tools, and files that they are for")
    return wanted


def _asked(report: Report, source: Source, wanted: Sequence[Linter], when: str = "") -> list[Checked]:
    """Every tool's answer, judged."""
    questions: dict[Linter, Callable[[], Checked]] = {
        "ruff": lambda: read_ruff(source),
        "ruff format": lambda: read_ruff_format(source),
        "eslint": lambda: read_eslint(source),
    }
    answers = [found for tool in wanted if (found := ask(report, tool + when, questions[tool]))]
    for checked in answers:
        hint = "correct by hand what no tool can" if when else "launch it with fix, or correct them by hand"
        judge(report, replace(checked, tool=checked.tool + when), hint, otherwise=Status.WARN)
    return answers


def _fix(report: Report, env: Environment, source: Source, wanted: Sequence[Linter]) -> None:
    """Repair on a branch, commit, look again, run the tests."""
    branch = f"ops/lint-{report.started:%Y%m%d-%H%M%S}"
    with worktree(source.repository, branch) as tree:
        if env.application.web_directory:
            bring_packages(tree, Path(env.application.web_directory))
        there = replace(
            source,
            repository=tree.directory,
            backend=tree.at(source.backend),
            web=tree.at(source.web),
            files=tuple(map(tree.at, source.files)),
        )
        repair(there, wanted)
        changed = tree.changed()
        if not tree.commit("Lint: what ruff and ESLint repair by themselves"):
            report.warn("fix", "correct them by hand", value="no tool could repair any of it")
            return
        answers = _asked(report, there, wanted, " after the fix")
        left = sum(len(checked.problems) for checked in answers)
        prove_branch(report, env, tree, source.seconds)
        keep_branch(report, env, tree)
        report.outcome += f"; {len(changed)} files repaired on {branch}, {left} problems left"


_SETTING = re.compile(
    r"^(linter\.line_length|formatter\.\w+|linter\.unresolved_target_version|linter\.preview) = (\S+)$"
)
_RULE = re.compile(r"^\t\S+ \(([A-Z]+[0-9]+)\),$")


def show_settings(report: Report, env: Environment, source: Source, wanted: Sequence[Linter]) -> None:
    """The main ones on the page, all of them in files beside the reports. A tool that does not tell them was told of
    already, or is told of here."""
    rows = list[tuple[str, str, str]]()
    try:
        if "ruff" in wanted or "ruff format" in wanted:
            text = read_ruff_settings(source)
            rows += [("ruff", *_kept(report, env, "ruff-settings.txt", text)), *_of_ruff(text)]
        if "eslint" in wanted and (file := _a_file(source)):
            text = read_eslint_settings(source, file)
            rows += [("eslint", *_kept(report, env, "eslint-settings.json", text)), *_of_eslint(text)]
    except OpsError as error:
        report.warn("settings in force", error.hint, value=error.message)
    report.table("Settings in force", ("tool", "setting", "value"), rows)


def _kept(report: Report, env: Environment, name: str, text: str) -> tuple[str, str]:
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


def _a_file(source: Source) -> Path | None:
    """A file that ESLint is for: of the chosen ones, else of the checkout."""
    chosen = [path for path in source.files if path.suffix in WEB]
    known = (source.web / name for name in git(source.web, "ls-files", "-z").split("\0"))
    return next((path for path in (*chosen, *known) if path.suffix in (".tsx", ".ts", ".js")), None)
