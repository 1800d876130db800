"""Tools' own answers, kept whole beside the reports."""

from __future__ import annotations

import re
from pathlib import Path

from blocks.environment import Environment
from runbook.errors import without_logins
from runbook.render import key
from runbook.report import Report


def keep(report: Report, env: Environment, name: str, text: str) -> Path:
    """Write one into this run's folder of evidence, readable by nobody else; the report's head says where."""
    folder = env.reports_directory / "evidence" / f"{report.started:%Y%m%dT%H%M%S%fZ}-{key(report)}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / re.sub(r"[^A-Za-z0-9.-]+", "-", name)
    path.touch(mode=0o600)
    path.write_text(without_logins(text), encoding="utf-8", errors="backslashreplace")
    report.fact("evidence", folder)
    return path
