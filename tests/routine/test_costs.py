"""review_costs: sums by month from a real bill and real lines, what is of no use any more, and what nobody can tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any

import httpx
import pytest

from flows.database.backup import backup_database
from flows.routine.costs import review_costs
from runbook.report import NOT_CONFIGURED, Report, Status
from tests.fixtures.application.broken import reported
from tests.fixtures.workday import NAME, TOKYO, Day, ago, app_line, finding, rows
from tests.routine.test_weekly import file
from tests.s3.servers import running_moto

PRICES = """
[ai_providers]
prices_from = "a test"
budget = 10
prices = { "gpt-4o" = [2.0, 8.0] }
"""
CLOUD = """
[cloud]
endpoint = "{endpoint}"
region = "eu-west-3"
access_key = "testing"
secret_key_env = "TRIAL_SECRET"
disk_price = 0.1
prices_from = "a test"
"""


def today() -> date:
    """Asked when a test runs: it may be another month than when the tests were collected."""
    return datetime.now(TOKYO).date()


def review(months: int = 3) -> Report:
    return reported(lambda: review_costs.fn(NAME, months))


def call(hours: float, tokens: int) -> str:
    return app_line(
        "AI API Call",
        hours,
        provider="azure",
        model="gpt-4o",
        prompt_tokens=tokens // 2,
        completion_tokens=tokens // 2,
        total_tokens=tokens,
    )


@pytest.fixture
def bill(day: Day, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real endpoint that speaks AWS's protocols, with 12.50 USD for this month; its section of the TOML. It is this
    test's own: one that was asked for the bill by another file's tests would answer with theirs, of UTC's month."""
    monkeypatch.setenv("TRIAL_SECRET", "testing")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    month = today().replace(day=1).isoformat()
    group: dict[str, Any] = {"Keys": ["Amazon EC2"], "Metrics": {"UnblendedCost": {"Amount": "12.5", "Unit": "USD"}}}
    period = {"TimePeriod": {"Start": month, "End": month}, "Groups": [group]}
    answer = {"results": [{"ResultsByTime": [period], "DimensionValueAttributes": []}]}
    with running_moto() as moto:
        endpoint = f"http://127.0.0.1:{moto.port}"
        httpx.post(f"{endpoint}/moto-api/static/ce/cost-and-usage-results", json=answer, timeout=120).raise_for_status()
        yield CLOUD.format(endpoint=endpoint)


def test_a_month_is_the_bill_and_the_tokens_together(day: Day, bill: str) -> None:
    day.write(PRICES + bill)
    day.log(call(0, 1_000_000))
    before = today().replace(day=1) - timedelta(days=15)
    past = [(f"{before:%Y-%m}", "10.00 USD", "7", "700", "1.00 USD", "11.00 USD")]
    file(day, "Review costs", 0, table=("Sums by month", past))
    report = review()
    sums = {row[0]: row[1:] for row in rows(report, "Sums by month")}
    assert len(sums) == 3
    assert sums[f"{today():%Y-%m}"] == ("12.50 USD", "1", "1,000,000", "5.00 USD", "17.50 USD")
    assert sums[f"{before:%Y-%m}"] == past[0][1:], "whose log is gone: as it was reviewed then"
    assert next(iter(sums.values())) == ("not measured",) * 5, "nobody knows of that one"
    assert report.outcome.startswith(f"{today():%Y-%m}: 17.50 USD")
    assert any(item.name == "Cost by month" and "17.50 USD" in item.svg for item in report.evidence)


def test_a_month_of_which_the_log_has_the_end_only_is_not_told_as_the_whole(day: Day) -> None:
    """Logs stay for 30 days (§6.2): of the month before this one half is gone when the quarter is reviewed."""
    day.write(PRICES)
    ended = datetime.combine(today().replace(day=1), datetime.min.time(), TOKYO) - timedelta(hours=5)
    hours = (datetime.now(TOKYO) - ended).total_seconds() / 3600
    day.log(call(hours, 1_000_000) + call(0, 1_000_000))
    month = f"{ended:%Y-%m}"
    sums = {row[0]: row[1:] for row in rows(review(), "Sums by month")}
    told = ("not measured", "at least 1", "at least 1,000,000", "at least 5.00 USD", "at least 5.00 USD")
    assert sums[month] == told
    assert sums[f"{today():%Y-%m}"][3] == "5.00 USD"
    whole = [(month, "not measured", "7", "7,000,000", "35.00 USD", "at least 35.00 USD")]
    older = file(day, "Review costs", 0, table=("Sums by month", whole))
    assert {row[0]: row[1:] for row in rows(review(), "Sums by month")}[month] == whole[0][1:], "who saw more of it"
    older.unlink()
    within = (datetime.now(TOKYO) - ended).days + 3
    file(day, "Review costs", within, table=("Sums by month", [(month, "9.00 USD", *whole[0][2:])]))
    sums = {row[0]: row[1:] for row in rows(review(), "Sums by month")}
    assert sums[month][0] == "at least 9.00 USD", "that was before the month had ended"
    assert sums[month][4] == "at least 44.00 USD"


def test_a_model_without_a_price_is_not_free(day: Day) -> None:
    day.write(PRICES)
    other = app_line(
        "AI API Call", 0, provider="azure", model="gpt-9", prompt_tokens=9, completion_tokens=9, total_tokens=18
    )
    day.log(call(0, 1_000_000) + other)
    assert rows(review(1), "Sums by month")[0][1:4:2] == ("not measured", "1,000,018")
    assert rows(review(1), "Sums by month")[0][4:] == ("at least 5.00 USD", "at least 5.00 USD")


def test_a_sum_without_one_of_its_parts_is_no_sum(day: Day) -> None:
    day.write(PRICES)
    day.log(call(0, 1_000_000))
    report = review(1)
    assert rows(report, "Sums by month")[0][1:] == ("not measured", "1", "1,000,000", "5.00 USD", "at least 5.00 USD")
    assert report.facts[NOT_CONFIGURED] == "cloud, docker"


def test_without_any_source_nothing_is_measured(day: Day) -> None:
    report = review(1)
    assert report.facts[NOT_CONFIGURED] == "ai_providers, cloud, docker"
    assert not [one for one in report.findings if one.name in ("what this month cost", "AI tokens")]
    day.write('[ai_providers]\nprices_from = "a test"\n')
    report = review(1)
    assert report.status is Status.WARN
    assert finding(report, "what this month cost").value.startswith("not measured")
    assert "no line “AI API Call”" in finding(report, "AI tokens").value
    (day.logs / "app.log").unlink()
    assert finding(review(1), "AI tokens by month").value.startswith("not measured: there is no log")


def test_a_cloud_that_does_not_answer_is_not_free(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIAL_SECRET", "testing")
    day.write(PRICES + CLOUD.format(endpoint="http://127.0.0.1:1"))
    day.log(call(0, 1_000_000))
    report = review(1)
    assert finding(report, "the cloud's bill").status is Status.WARN
    assert rows(report, "Sums by month")[0][-1] == "at least 5.00 USD"


def test_what_is_of_no_use_any_more_is_told_with_what_frees_it(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.routine.savings.LEAST_BYTES", 1000)
    old = day.logs / "app.log.9"
    old.write_bytes(b"x" * 5000)
    os.utime(old, (ago(24 * 40).timestamp(),) * 2)
    kept = f"{day.database}__old_20260101_000000"
    try:
        day.postgres.create_database(kept)
        day.postgres.sql("CREATE TABLE t (n int PRIMARY KEY); CREATE INDEX twice ON t (n)", database=day.database)
        backup_database.fn(NAME)
        report = review(1)
    finally:
        day.postgres.drop_database(kept)
    found = {row[0]: row[3] for row in rows(report, "What could be saved")}
    assert found == {
        "1 × database replaced by a restore": "launch discard-superseded/trial",
        "1 duplicate indexes": "launch check-indexes/trial",
        "1 rotated logs older than 30 days": "launch clean-logs/trial",
    }
    assert finding(report, "what could be saved").status is Status.WARN
    assert finding(report, "what could be saved").value.endswith("(no price: [cloud] disk_price)")
