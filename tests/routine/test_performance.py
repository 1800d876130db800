"""review_performance: percentiles and errors of real lines, slow statements of a real server, trends of real reports."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from datetime import UTC, datetime, timedelta

import pandas
import pytest

from flows.routine.performance import review_performance
from flows.routine.sources.trends import days_until
from runbook.files import chain
from runbook.report import Report, Status
from tasks.postgres.sessions import statements
from tests.fixtures.application.broken import reported
from tests.fixtures.servers import PostgresServer
from tests.fixtures.workday import NAME, Day, access_line, ago, app_line, finding, rows


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "PAUSE_SECONDS", 0.01)


def review(days: int = 30) -> Report:
    return reported(lambda: review_performance.fn(NAME, days))


def test_percentiles_are_those_of_the_lines_by_path_over_rotated_files(day: Day) -> None:
    packed = day.logs / "app.log.1.gz"
    lines = [access_line(f"/api/x/{n}", ms, hours=30) for n, ms in enumerate(range(1, 101))]
    old = [app_line("began", 24 * 70), *[access_line("/api/x/1", 10, hours=24 * 31)] * 3]
    packed.write_bytes(gzip.compress("".join([*old, *lines]).encode()))
    os.utime(packed, (ago(20).timestamp(),) * 2)
    day.log(
        access_line("/api/x/6a1f0c1e-8f6b-4a51-9d3e-0123456789ab/7?page=2", 50, 404),
        "Traceback\n",
        access_line("/api/x/1", 1, status=None),
    )
    report = review()
    paths = rows(report, "Paths")
    assert paths[0][:6] == ("GET /api/x/{id}", "100", "50", "95", "99", "100")
    assert paths[1][:3] == ("GET /api/x/{id}/{id}", "1", "50")
    assert paths[1][-2:] == ("0", "1"), "what a client got wrong is no error"
    assert "after 10 ms" in finding(report, "slower than the days before").value
    assert finding(report, "access lines without a status").value == "1"
    assert finding(report, "requests: lines that are not JSON").value == "1"
    pictures = [item.name for item in report.evidence if item.svg]
    assert pictures[0] == "Response time, p95 by day (Asia/Tokyo)"


def test_a_slow_path_and_an_error_rate_are_found(day: Day) -> None:
    day.log(*[access_line("/api/fast", 20)] * 80, *[access_line("/api/slow", 3000)] * 4)
    report = review()
    assert finding(report, "api.response_seconds").status is Status.OK, "of all it is not"
    assert finding(report, "slow paths").value == "GET /api/slow: p95 3.0 s of 4"
    assert finding(report, "paths that fail").status is Status.OK
    day.log(*[access_line("/api/broken", 20, 500)] * 20)
    report = review()
    assert finding(report, "api.error_ratio").status is Status.CRITICAL
    assert finding(report, "paths that fail").value == "GET /api/broken: 100% of 20"
    assert "summarise-errors" in finding(report, "paths that fail").hint


def test_without_access_lines_nothing_is_measured_and_nothing_is_well(day: Day) -> None:
    report = review()
    assert report.status is Status.WARN
    assert finding(report, "requests").value.startswith("not measured: no request line in the last 30 days")
    assert "requests, statements" in finding(report, "all places where time goes").value
    (day.logs / "app.log").unlink()
    assert finding(review(), "requests").value.startswith("not measured: there is no log")


def test_a_server_without_the_extension_says_how_to_install_it(day: Day, counting: PostgresServer) -> None:
    found = finding(review(), "slow statements")
    assert found.status is Status.WARN
    assert "its library is not loaded" in found.value
    assert "shared_preload_libraries" in found.hint
    counting.create_database("without")
    day.write(postgres=counting.port, database="without")
    found = finding(review(), "slow statements")
    assert "the extension is not in without" in found.value
    assert "CREATE EXTENSION pg_stat_statements" in found.hint
    counting.sql("CREATE EXTENSION pg_stat_statements", database="postgres")
    try:
        counting.sql("SELECT n FROM generate_series(1, 9) AS n", database="without")
        report = review()
    finally:
        counting.sql("DROP EXTENSION pg_stat_statements", database="postgres")
    assert finding(report, "slow statements").status is Status.OK, "the view counts for all databases"
    assert any("generate_series" in row[-1] for row in rows(report, "Statements by time"))
    assert not any("CREATE DATABASE" in row[-1] for row in rows(report, "Statements by time")), "another database's"


def test_a_slow_statement_is_found_with_its_texts_masked(
    day: Day, counting: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    day.write(postgres=counting.port, database="grc_db")
    monkeypatch.setattr("flows.routine.performance.SLOW_STATEMENT_MS", 50.0)
    counting.sql("SELECT pg_stat_statements_reset()", database="grc_db")
    for _ in range(3):
        counting.sql("SELECT pg_sleep(0.1), 'taro@example.com'", database="grc_db")
    counting.sql("ALTER ROLE grc_user PASSWORD 'role:p@ss/word-4712'", database="grc_db")
    report = review()
    found = finding(report, "slow statements")
    assert found.status is Status.WARN
    assert "× 3: SELECT pg_sleep($1)" in found.value
    assert "taro@" not in str(report.as_json())
    assert "p@ss" not in str(report.as_json())
    assert rows(report, "Statements by time")[0][1] == "3"
    assert [row[0] for row in rows(report, "Where the time goes")][0] == "statements"


def test_a_database_that_is_down_leaves_the_requests(day: Day) -> None:
    day.log(*[access_line("/api/fast", 20)] * 3)
    day.write(postgres=1)
    report = review()
    assert "does not answer" in finding(report, "slow statements").value
    assert finding(report, "waits").status is Status.WARN
    assert finding(report, "api.response_seconds").status is Status.OK
    assert "figures of postgres" in {one.name for one in report.findings}


def test_figures_are_drawn_with_those_of_the_reviews_before(day: Day) -> None:
    day.log(*[access_line("/api/fast", 20)] * 30)
    first = review()
    assert finding(first, "trends").value == "not measured: there is no earlier report"
    for days in (60, 30):  # as it was filed then
        past = json.loads(first.path.read_text()) if first.path else {}
        past["started"] = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        for item in past["evidence"]:
            item["rows"] = [["disk of /", str(0.9 - days / 100), "x", "0.95"]] if item["name"] == "Figures" else []
        chain.append(day.base / "reports", "review-performance", past)
    report = review()
    (picture,) = [item.svg for item in report.evidence if item.name.startswith("Trends")]
    assert all(f">{name}<" in picture for name in ("disk of /", "failed requests", "database", "Redis' memory"))
    assert "requests a day" not in picture, "the log has 3 of the 30 days"
    assert report.path
    (table,) = [item for item in report.evidence if item.name == "Figures"]
    kept = pandas.read_csv(table.csv_path(report.path))
    disk = kept[kept["figure"] == "disk of /"]["value"].tolist()
    assert disk[:2] == pytest.approx([0.3, 0.6])
    assert len(disk) == 4, "two past ones, the first review and this one"
    filed = json.loads(report.path.read_text())
    (stored,) = [item for item in filed["evidence"] if item["name"] == "Figures"]
    assert stored["csv"] == hashlib.sha256(table.csv_path(report.path).read_bytes()).hexdigest()
    assert table.csv_path(report.path).name in report.path.with_suffix(".md").read_text()
    now, month = datetime.now(UTC), timedelta(days=30)
    line = pandas.DataFrame({"began": [now - 2 * month, now - month, now], "value": [0.3, 0.6, 0.9]})
    assert days_until(line, 0.95) == pytest.approx(5)
    assert days_until(line.assign(value=[0.9, 0.6, 0.3]), 0.95) is None
    assert days_until(line, 0) is None
    assert days_until(line.iloc[:1], 0.95) is None
