"""The linters' settings in force, as evidence (§3.4)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from blocks.environment import Environment
from flows.application.code_findings import evidence_path
from runbook.errors import OpsError
from runbook.report import Report
from tasks.code.lint import Linter, Source, read_eslint_settings, read_ruff_settings
from tasks.code.problem import WEB
from tasks.worktree import git

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
