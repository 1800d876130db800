"""Types of the application's code (§3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from flows.application.code_findings import ask, attach_problems, checkout_of, evidence_path, judge, workspace_of
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.code.problem import PYTHON, WEB, CheckedCode, chosen_files
from tasks.code.types import read_mypy, read_tsc

Tool = Literal["mypy", "tsc"]


@flow(name="check-types", flow_run_name=RunName("check-types {environment} {tools}"))
def check_types(
    environment: str,
    tools: tuple[Tool, ...] = ("mypy", "tsc"),
    strict: bool = False,
    files: list[str] = [],  # noqa: B006 — only read
    seconds: Annotated[int, Field(ge=1, le=7200)] = 600,
) -> Report:
    """TypeScript/Python型チェック (§3.3)

    Runs mypy and TypeScript's compiler on the application's checkout: as configured there or strict, on all files or
    chosen ones. Run it before a release and after an update of packages.

    It changes nothing: caches and compiler state are outside the checkout. A tool that is missing, hangs, prints no
    valid answer or checks no file is CRITICAL. Evidence: errors by file and by code, and mypy's HTML report if lxml is
    installed for it.

    Departs from the manual: `tsc FILE` ignores tsconfig.json, so the whole project is checked and the errors of the
    chosen files are shown. `--watch` never ends and is not offered.

    Args:
        environment: Environment (lab, staging, production …)
        tools: Tools
        strict: Check with --strict in addition to the configuration
        files: Files, from the repository's root. Empty: all
        seconds: Time limit of each tool, in seconds
    """
    env = Environment.find(environment)
    with runbook("Check types", env) as report:
        if not tools:
            raise OpsError("no tool is chosen", "choose mypy, tsc or both in tools")
        repository, application = checkout_of(report, env), env.application
        python, web = (chosen_files(repository, files, suffixes) for suffixes in (PYTHON, WEB))
        html = evidence_path(report, env, "mypy")
        questions: dict[Tool, Callable[[], CheckedCode]] = {
            "mypy": lambda: read_mypy(
                application,
                repository,
                python,
                strict=strict,
                seconds=seconds,
                cache=env.reports_directory / "cache" / "mypy",
                html=html,
            ),
            "tsc": lambda: read_tsc(workspace_of(env), repository, web, strict=strict, seconds=seconds),
        }
        wanted = [tool for tool in dict.fromkeys(tools) if not files or (python if tool == "mypy" else web)]
        if not wanted:
            raise OpsError("none of the chosen tools checks any of the chosen files", "choose .py or .ts/.tsx files")
        answers = [found for tool in wanted if (found := ask(report, tool, questions[tool]))]
        for checked in answers:
            judge(report, checked, "fix them in the order of the table; lint-code can fix some")
        attach_problems(report, answers)
        if (html / "index.html").exists():
            report.fact("HTML report", html / "index.html")
        errors = sum(checked.errors for checked in answers)
        report.outcome = f"{errors} type errors in {sum(checked.files for checked in answers)} files"
    return report
