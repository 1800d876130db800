"""Token usage of the application's AI calls, and its cost (§5.2)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path

from blocks.ai_providers import AIProviders
from blocks.environment import Environment
from flows.logs.findings import report_files_read, report_undated
from runbook import metrics
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures import tokens
from tasks.logs.figures.tokens import SUMS, TokenUse, frame_of
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import reading


@flow(name="report-token-usage", flow_run_name=RunName("report-token-usage {environment} {month}"))
def report_token_usage(environment: str, month: str = "") -> Report:
    """トークン使用量監視: 日次トークン使用量集計・モデル別の使用量 (§5.2)

    Sums the tokens of a month by day, provider and model, with their cost by the environment's table of prices.
    Compares the cost with the budget, forecasts the month, and finds days with far more tokens than the days before.
    Run it daily.

    It changes nothing. 80 % of the budget, or a forecast over it, is WARN; more than the budget is CRITICAL
    (`[thresholds]` sets other limits). A model without a price is a WARN; its cost is not in the sums.

    Departs from the manual: its formatter drops token counts from the log (§6.1); such calls are counted separately,
    never as 0 tokens. Its queries skip rotated files.

    Args:
        environment: Environment (lab, staging, production …)
        month: Month (e.g. 2026-02, in the environment's time zone). Empty: this month
    """
    env = Environment.find(environment)
    with runbook("Report token usage", env) as report:
        report.outcome = judge_usage(report, env, month)
    return report


def judge_usage(report: Report, env: Environment, month: str = "") -> str:
    """Tokens and cost of a month ("": the current one) against the budget; returns a summary.

    Raises:
        OpsError: there is no log, or `month` is no month.
    """
    today = datetime.now(env.zone).date()
    first, last = _month(month, today)
    begin = first - timedelta(days=tokens.WINDOW_DAYS)
    since = datetime.combine(begin, time(), env.zone)
    wanted = tokens.calls(env.logs.ai_message).within(
        since, datetime.combine(last + timedelta(days=1), time(), env.zone)
    )
    with reading(find_logs(Path(env.logs.need("app"))), env.zone, since=since, names=env.logs.fields) as source:
        bad = source.pick_each(picked=wanted.choice(tokens.COLUMNS), undated=wanted.undated())
        uses = tokens.read_use(source)
        report_files_read(report, source, bad)
        report_undated(report, source)
    own = [use for use in uses if use.day >= first]
    _attach_use(report, env, own, first, last)
    _judge_budget(report, env, uses, own, today if not month or last == today else None)
    unusual = tokens.unusual_days(tokens.by_day(uses, begin, last), first)
    report.prefer(
        "unusual days",
        not unusual,
        "find the users of those days in the logs",
        value="; ".join(
            f"{day}: {_tokens(own, day):,} tokens after a median of {median:,.0f}" for day, median in unusual.items()
        )
        or "none",
        follow=[Next("search-logs")],
    )
    return f"{sum(use.total for use in own):,} tokens in {sum(use.calls for use in own):,} calls"


def _month(text: str, today: date) -> tuple[date, date]:
    """The first day of the month, and its last day or today."""
    if not text.strip():
        return today.replace(day=1), today
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", text.strip()):
        raise OpsError(f"“{text[:20]}” is no month", "enter it as 2026-02, or leave it empty for the current month")
    first = date.fromisoformat(f"{text.strip()}-01")
    if first > today:
        raise OpsError(f"{text} is in the future", "leave it empty for the current month")
    return first, min(today, (first + timedelta(days=31)).replace(day=1) - timedelta(days=1))


def _tokens(uses: Sequence[TokenUse], day: date) -> int:
    return sum(use.total for use in uses if use.day == day)


def _attach_use(report: Report, env: Environment, own: Sequence[TokenUse], first: date, last: date) -> None:
    """Tables and plots of the tokens by model and by day."""
    prices = env.ai_providers.prices if env.has("ai_providers") else {}
    found = frame_of(own, prices)
    rows = [
        (
            *names,
            *(f"{int(sums[name]):,}" for name in SUMS),
            f"{sums['cost']:,.2f}" if names[1] in prices else "no price",
        )
        for names, sums in found.groupby(["provider", "model"])[[*SUMS, "cost"]]
        .sum()
        .sort_values("total", ascending=False, kind="stable")
        .iterrows()
    ]
    currency = env.ai_providers.currency if env.has("ai_providers") else ""
    columns = ("provider", "model", "calls", "prompt tokens", "completion tokens", "tokens", f"cost {currency}".strip())
    report.table("By model", columns, rows, csv=found.to_csv(index=False))
    days = tokens.by_day(own, first, last)
    report.attach(Evidence("Tokens by day", svg=bars([Bar(str(day), (n,), f"{n:,}") for day, n in days.items()])))
    tokenless = sum(use.tokenless for use in own)
    report.prefer(
        "token counts are in the log",
        not tokenless,
        "fix the application's log formatter, which drops extra= (docs/logs.md): the sums are too low",
        value=f"{tokenless:,} of {sum(use.calls for use in own):,} calls have none" if tokenless else "all",
    )


def _judge_budget(
    report: Report, env: Environment, uses: Sequence[TokenUse], own: Sequence[TokenUse], today: date | None
) -> None:
    """Judge the cost against the budget. `today`: in the current month only."""
    if not env.has("ai_providers") or not env.ai_providers.prices:
        report.warn(
            "cost",
            "add [ai_providers] prices and budget to the environment's TOML",
            value="not known: there is no table of prices",
        )
        return
    ai = env.ai_providers
    _judge_prices(report, ai, own)
    costs = defaultdict[date, float](float)
    for use in uses:
        costs[use.day] += use.cost(ai.prices) or 0.0
    spent = sum(costs[day] for day in {use.day for use in own})
    report.fact("cost", f"{spent:,.2f} {ai.currency}, by prices of {ai.prices_from or 'no named source'}")
    expected = tokens.forecast(costs, today) if today else spent
    if today:
        report.fact("forecast", f"{expected:,.2f} {ai.currency} for the whole month")
    if not ai.budget:
        report.warn("budget", "set [ai_providers] budget", value="none")
        return
    used = spent / ai.budget
    hint = "check the tables by day and model; lower the limit per user"
    report.judge(metrics.TOKENS, used, hint, of=f"{ai.budget:,.2f} {ai.currency}")
    if today and used < 1:
        report.prefer(
            "forecast of the month",
            expected <= ai.budget,
            "lower the limit per user, or raise the budget: at this rate the month exceeds it",
            value=f"{expected:,.2f} {ai.currency}",
            expected=f"≤ {ai.budget:,.2f} {ai.currency}",
        )


def _judge_prices(report: Report, ai: AIProviders, own: Sequence[TokenUse]) -> None:
    """Whether the cost is complete: a price for every model, and both kinds of tokens for every call."""
    unpriced = sorted({use.model for use in own if use.model not in ai.prices})
    report.prefer(
        "every model has a price",
        not unpriced,
        "add it to [ai_providers] prices: its cost is not in the sums",
        value=", ".join(unpriced) or "yes",
    )
    unsplit = sum(use.unsplit for use in own)
    report.prefer(
        "every call logs its prompt and completion tokens",
        not unsplit,
        "make the application log both, because their prices differ: the cost is too low",
        value=f"{unsplit:,} log only a total" if unsplit else "yes",
    )
