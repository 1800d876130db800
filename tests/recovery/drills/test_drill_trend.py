"""The drills before this one: of this environment, those that measured something, the earliest first."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.recovery.drills import past_drills
from flows.recovery.drills.summary import MEASURED
from runbook.files import chain
from runbook.report import Finding, Report, Status

BEGIN = datetime(2026, 3, 1, 3, tzinfo=UTC)


def drill(directory: Path, days: int, rto: float | None, *, name: str = "lab", bad: bool = False) -> None:
    at = BEGIN + timedelta(days=days)
    report = Report("DR drill", name, started=at, finished=at)
    if bad:
        report.findings.append(Finding("RTO", Status.CRITICAL))
    if rto is not None:
        report.table(MEASURED, ("measure", "value"), [("scenario", "region_outage"), ("rto_seconds", rto)])
    chain.append(directory, "dr-drill", report.as_json())


def test_those_of_this_environment_that_measured_something(tmp_path: Path) -> None:
    for days, rto in ((2, 30.0), (1, 20.0), (3, None)):
        drill(tmp_path, days, rto)
    drill(tmp_path, 4, 99.0, name="staging")
    drill(tmp_path, 5, 10.0, bad=True)
    report = Report("DR drill", "lab")
    past_drills.report_trend(report, tmp_path, "region_outage")
    table, picture = report.evidence
    assert [row[:4] for row in table.rows] == [
        ("2026-03-02 03:00", "region_outage", "OK", "20.0"),
        ("2026-03-03 03:00", "region_outage", "OK", "30.0"),
        ("2026-03-06 03:00", "region_outage", "CRITICAL", "10.0"),
    ]
    assert len(re.findall(r'id="bar-', picture.svg)) == 3
    assert report.facts["RTO of earlier drills"] == "best 20.0 s, last 30.0 s, of 2", "a failed one is no measure"
