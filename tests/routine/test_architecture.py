"""The architect's facts, of real servers: topology, versions with their end, growth and incidents; what is over is found."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from flows.routine.architecture import collect_architecture_facts
from runbook.errors import RunbookFailed
from runbook.files import chain
from runbook.metrics import Measure
from runbook.report import Finding, Report, Status
from tasks.docker import bases
from tests.fixtures.reports import bad, rows
from tests.fixtures.servers import PostgresServer
from tests.redis.servers import RedisServer
from tests.routine.test_audit import NAME, audited

__all__ = ["audited"]
TABLES = """
[postgres]
source = "a test"
checked = {today}
ends = {{ "15" = "{ends}", "16" = "{ends}", "17" = "{ends}", "18" = "{ends}" }}
[valkey]
source = "a test"
checked = {today}
ends = {{ "9.1" = "" }}
[redis]
source = "a test"
checked = {today}
ends = {{ "8.0" = "" }}
[python]
source = "a test"
checked = {today}
ends = {{ "3.11" = "{later}", "3.12" = "{later}", "3.13" = "{later}", "3.14" = "{later}" }}
"""


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> date:
    """PostgreSQL's support ended the day before yesterday."""
    today = date.today()
    over, later = today - timedelta(days=2), today + timedelta(days=900)
    (tmp_path / "releases.toml").write_text(TABLES.format(today=today, ends=over, later=later))
    monkeypatch.setattr(bases, "RELEASES", tmp_path / "releases.toml")
    return over


def collect() -> Report:
    try:
        return collect_architecture_facts.fn(NAME)
    except RunbookFailed as error:
        return error.report


def past(directory: Path, title: str, days: int, *, size: int = 0, problem: str = "") -> None:
    """A report of the past."""
    at = datetime.now(UTC) - timedelta(days=days)
    report = Report(title, NAME, started=at, finished=at + timedelta(minutes=1))
    if size:
        report.measures.append(Measure("database backup", size, 10.0))
    if problem:
        report.findings.append(Finding(problem, Status.CRITICAL))
    chain.append(directory, title.lower().replace(" ", "-"), report.as_json())


def test_what_runs_grows_and_failed(audited: RedisServer, postgres_server: PostgresServer, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    for days, gigabytes in ((400, 9), (92, 2), (61, 3), (31, 4), (1, 5)):
        past(reports, "Verify backup", days, size=gigabytes << 30)
    past(reports, "Full restore", 80, problem="backup is whole")
    past(reports, "Full restore", 79)
    past(reports, "Check logging", 20, problem="lines that are JSON")
    past(reports, "Check logging", 10, problem="times have a zone")
    report = collect()
    topology = rows(report, "Topology")
    assert ("PostgreSQL", "postgres", f"127.0.0.1:{postgres_server.port}", "primary") in topology
    assert ("Redis", "redis", f"127.0.0.1:{audited.port}", "one server, no Sentinels") in topology
    assert [row[:3] for row in topology if row[0] == "service"] == [("service", "backend", "sleeper")]
    versions = {row[0]: row for row in rows(report, "Versions and end of life")}
    assert versions["postgres"][1].split(".")[0] in {"15", "16", "17", "18"}
    assert "postgresql.org" in versions["postgres"][4]
    (trend,) = rows(report, "Capacity trend (size of backups)")
    assert trend[0] == "database"
    assert trend[-1].startswith("1."), "3 GB in three months; what is older than a year does not count"
    incidents = rows(report, "Incidents: CRITICAL reports by runbook")
    assert [(row[:3], row[4]) for row in incidents] == [
        (("2", "2", "Check logging"), "times have a zone"),
        (("1", "2", "Full restore"), "backup is whole"),
    ]
    assert bad(report)["no runbook's last report is CRITICAL"] == "Check logging"
    assert "3 incidents in 365 days" in report.outcome


def test_what_is_no_longer_supported_or_does_not_answer_is_found(
    audited: RedisServer, postgres_server: PostgresServer, ends: date
) -> None:
    audited.remove()
    report = collect()
    assert report.status is Status.CRITICAL
    (over,) = [(name, value) for name, value in bad(report).items() if name.startswith("support of postgres 1")]
    assert over[1].startswith(f"ended {ends}, by a test")
    assert "1 without support" in report.outcome
    assert "not measured: memory of Redis" in bad(report)
    assert "not measured: capacity trend" in bad(report)
    assert [row for row in rows(report, "Topology") if row[0] == "Redis"][0][3] == "does not answer"
