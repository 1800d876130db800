"""Earlier drills, from their reports."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from flows.recovery.drills.summary import MEASURED
from runbook.page import render
from runbook.report import Evidence, Report, Status, StepTime
from tasks.reports.past import Filed, filed

MOST = 20
_ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)
COLUMNS = ("began", "scenario", "status", "RTO (s)", "lost writes", "RPO (s)", *(f"phase {n} (s)" for n in range(1, 7)))
_MEASURES = ("rto_seconds", "lost_writes", "rpo_seconds", *(f"phase_{n}_seconds" for n in range(1, 7)))


def report_results(report: Report, directory: Path, scenario: str) -> None:
    """The newest drills of every scenario, and the best and the last RTO of this one."""
    newest = islice(filed(directory, report.environment, render.key(report)), MOST)
    past = [row for row in map(_row, newest) if row][::-1]  # the oldest first
    report.table("Trend: earlier drills", COLUMNS, past)
    if drawn := [row for row in past if row[3]]:
        picture = render.bars([_bar(row) for row in drawn], _ORIGIN)
        report.attach(Evidence("RTO of earlier drills", svg=picture))
    same = [float(row[3]) for row in past if row[1] == scenario and row[3] and row[2] != "CRITICAL"]
    if same:
        report.fact("RTO of earlier drills", f"best {min(same):.1f} s, last {same[-1]:.1f} s, of {len(same)}")


def _bar(row: tuple[str, ...]) -> StepTime:
    """Its length is the RTO."""
    status = Status.CRITICAL if row[2] == "CRITICAL" else Status.OK
    return StepTime(f"{row[0]} {row[1]}", _ORIGIN, float(row[3]), status)


def _row(one: Filed) -> tuple[str, ...] | None:
    """None if it measured nothing: a plan, a refusal, a drill that was healed."""
    measured = {row[0]: row[1] for row in one.rows(MEASURED) if len(row) == 2}
    if "scenario" not in measured:
        return None
    begun = str(one.content["started"])[:16].replace("T", " ")
    return (begun, measured["scenario"], one.status, *(str(measured.get(name, "")) for name in _MEASURES))
