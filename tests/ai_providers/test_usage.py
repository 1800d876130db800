"""report_token_usage: sums by day and model, cost, budget, forecast, unusual days; nothing counted as 0 silently."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from flows.ai_providers.usage import report_token_usage
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.logs.figures.tokens import forecast, unusual_days
from tests.fixtures.logfiles import NAME, line
from tests.fixtures.reports import bad

FEBRUARY = datetime(2026, 2, 1, 3, tzinfo=UTC)  # noon in Tokyo
PRICED = """
[ai_providers]
budget = {budget}
prices_from = "a test"
prices = {{ "gpt-4o" = [2.5, 10.0], "gemini-1.5-pro" = [1.0, 4.0] }}
"""


def call(day: int, total: int | None = 1_000_000, model: str = "gpt-4o", **fields: object) -> str:
    tokens = (
        {} if total is None else {"prompt_tokens": total // 2, "completion_tokens": total // 2, "total_tokens": total}
    )
    return line(
        "AI API Call", FEBRUARY + timedelta(days=day - 1), model=model, provider="azure", **{**tokens, **fields}
    )


def write(logs: Path, *lines: str, budget: float = 0) -> None:
    (logs / "app.log").write_text("".join(lines))
    toml = logs.parent / "trial.toml"
    toml.write_text(toml.read_text().partition("[ai_providers]")[0] + (PRICED.format(budget=budget) if budget else ""))


def rows(report: Report) -> list[tuple[str, ...]]:
    return list(next(item.rows for item in report.evidence if item.name == "By model"))


def test_tokens_and_costs_are_added_up_by_model_in_the_operators_month(logs: Path) -> None:
    new_year = line(
        "AI API Call",
        datetime(2026, 1, 31, 15, tzinfo=UTC),
        model="gpt-4o",
        provider="azure",
        prompt_tokens=1,
        completion_tokens=1,
        total_tokens=2,
    )
    write(logs, call(0), new_year, call(3), call(4, 500_000, "gemini-1.5-pro"), line("request"), budget=100)
    report = report_token_usage.fn(NAME, month="2026-02")
    assert rows(report) == [
        ("azure", "gpt-4o", "2", "500,001", "500,001", "1,000,002", "6.25"),
        ("azure", "gemini-1.5-pro", "1", "250,000", "250,000", "500,000", "1.25"),
    ]
    assert report.facts["cost"].startswith("7.50 USD")
    assert report.status is Status.OK, report.sentence()


def test_calls_without_counts_and_models_without_a_price_are_told(logs: Path) -> None:
    write(logs, call(1), call(2, None), call(3, model="new-model"), budget=100)
    found = bad(report_token_usage.fn(NAME, month="2026-02"))
    assert found["token counts are in the log"] == "1 of 3 calls have none"
    assert found["every model has a price"] == "new-model"
    write(logs, call(1))
    assert "no table of prices" in bad(report_token_usage.fn(NAME, month="2026-02"))["cost"]


def test_a_call_is_counted_by_what_its_line_tells(logs: Path) -> None:
    """Of prompt, completion and total any two tell the third; a cost that is not known is no 0."""
    write(
        logs,
        call(1, None, prompt_tokens=600_000, completion_tokens=400_000),
        call(2, None, prompt_tokens=600_000, total_tokens=1_000_000),
        call(3, None, prompt_tokens=600_000),
        call(4, None, total_tokens=1_000_000),
        call(5).replace(call(5)[: call(5).index(",")], '{"timestamp": "some day"'),
        budget=100,
    )
    report = report_token_usage.fn(NAME, month="2026-02")
    assert rows(report) == [("azure", "gpt-4o", "4", "1,800,000", "800,000", "3,600,000", "12.50")]
    found = bad(report)
    assert found["every call logs its prompt and completion tokens"] == "1 log only a total"
    assert found["lines without a readable time"] == "1"
    assert "token counts are in the log" not in found


def test_80_percent_of_the_budget_warns_and_all_of_it_is_critical(logs: Path) -> None:
    write(logs, call(1), call(2), budget=16)  # 12.50
    assert not [name for name in bad(report_token_usage.fn(NAME, month="2026-02")) if name.startswith("ai.tokens")]
    write(logs, call(1), call(2), budget=15.6)
    found = bad(report_token_usage.fn(NAME, month="2026-02"))
    assert found["ai.tokens.budget_ratio (15.60 USD)"] == "80.1 %"
    write(logs, call(1), call(2), budget=12.4)
    with pytest.raises(RunbookFailed, match=r"ai.tokens.budget_ratio \(12.40 USD\): 100.8 %"):
        report_token_usage.fn(NAME, month="2026-02")


def test_an_unusual_day_is_reported(logs: Path) -> None:
    usual = [call(day, 1000 + 20 * day) for day in range(-10, 11)]
    write(logs, *usual, budget=100)
    assert "unusual days" not in bad(report_token_usage.fn(NAME, month="2026-02"))
    write(logs, *usual, call(9, 4000), budget=100)
    assert bad(report_token_usage.fn(NAME, month="2026-02"))["unusual days"].startswith("2026-02-09: 5,180 tokens")


def test_a_forecast_goes_on_as_the_last_week_was() -> None:
    costs = {date(2026, 2, day): 1.0 for day in range(1, 11)}
    assert forecast(costs, date(2026, 2, 10)) == 28
    assert forecast({**costs, date(2026, 2, 10): 5.0}, date(2026, 2, 10)) == 9 + 5 + 18
    assert unusual_days({date(2026, 2, day): 100 for day in range(1, 20)}, date(2026, 2, 1)) == {}


def test_a_month_that_is_none_is_refused(logs: Path) -> None:
    write(logs, call(1))
    for month, said in (("02/2026", "is no month"), ("2099-01", "is in the future")):
        with pytest.raises(OpsError, match=said):
            report_token_usage.fn(NAME, month=month)
