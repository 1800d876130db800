"""Drills before this one, from the reports of the chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.recovery.drills.telling import MEASURED
from runbook.report import Report

MOST = 20
COLUMNS = ("began", "scenario", "status", "RTO (s)", "lost writes", "RPO (s)", *(f"phase {n} (s)" for n in range(1, 7)))
_MEASURES = ("rto_seconds", "lost_writes", "rpo_seconds", *(f"phase_{n}_seconds" for n in range(1, 7)))


def tell(report: Report, directory: Path, scenario: str) -> None:
    """The newest ones, of every scenario, and whether this one's RTO became worse."""
    past = [row for path in sorted(directory.glob(f"*-{_key(report)}.json"))[-MOST:] if (row := _row(path))]
    report.table("Trend: the drills before this one", COLUMNS, past)
    same = [float(row[3]) for row in past if row[1] == scenario and row[3] and row[2] != "CRITICAL"]
    if same:
        report.fact("RTO of earlier drills", f"best {min(same):.1f} s, last {same[-1]:.1f} s, of {len(same)}")


def _key(report: Report) -> str:
    return report.runbook.lower().replace(" ", "-")


def _row(path: Path) -> tuple[str, ...] | None:
    """None where it measured nothing: a plan, a refusal, a drill that was healed."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        (measured,) = [dict(item["rows"]) for item in found["evidence"] if item["name"] == MEASURED]
        begun = str(found["started"])[:16].replace("T", " ")
        return (begun, measured["scenario"], found["status"], *(str(measured.get(name, "")) for name in _MEASURES))
    except (OSError, ValueError, KeyError, TypeError):
        return None
