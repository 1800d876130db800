"""An evidence file with the lines that a search found: masked, readable by the worker's user only."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blocks.environment import Environment
from runbook.masking import masked_value
from runbook.page.render import key
from runbook.report import Report


def keep_lines(report: Report, env: Environment, lines: Sequence[str]) -> None:
    """Write the lines to a file in the report folder, and name it in the report."""
    if not lines:
        return
    folder = env.reports_directory / "evidence"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{report.started:%Y%m%dT%H%M%S%fZ}-{key(report)}.jsonl"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        path.chmod(0o600)
        file.writelines(json.dumps(masked_value(json.loads(line)), ensure_ascii=False) + "\n" for line in lines)
    report.fact("evidence", f"{path}: {len(lines):,} lines, masked")
