"""What is paid for: the cloud's bill, AI tokens, and their sums by month (§7.1, §7.4)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path

from flows.ai_providers.usage import tell_tokens
from flows.infrastructure.resources import review_cloud, review_docker
from flows.routine.past import MONTHLY, judge_last
from flows.routine.steps import Page
from runbook import render
from runbook.plots import Bar, bars
from runbook.report import Evidence
from tasks.logs import tokens
from tasks.logs.conditions import Conditions
from tasks.logs.files import find_logs
from tasks.logs.source import reading
from tasks.reports import filed

TABLE = "Sums by month"
SAMPLES, MOST_REPORTS = 2, 24
Bill = Mapping[str, float]


def judge_resources(page: Page) -> Bill:
    """The account at the cloud provider and the Docker Engine; else what review-resources found last. Returns the bill
    by month."""
    env, bill = page.env, dict[str, float]()
    if env.has("docker"):
        page.part("Docker", lambda: review_docker(page.report, env, SAMPLES))
    if env.has("cloud"):
        bill = dict(review_cloud(page.report, env))
        if not bill:
            page.not_measured("the cloud's bill", "it could not be read, or is empty", "see what is said of it")
    else:
        judge_last(page, "cloud resources", "review-resources", MONTHLY)
    return bill


def judge_tokens(page: Page, month: str = "") -> str | None:
    """Of this month, against the budget. None in a month without any call tells nothing."""
    if not page.names("AI tokens", "logs"):
        return None
    told = page.part("AI tokens", lambda: tell_tokens(page.report, page.env, month))
    if told and told.endswith(" in 0 calls"):
        page.not_measured("AI tokens", "the log has no line “AI API Call” of this month",
                          "is it the application's own log? docs/ai-providers.md")  # fmt: skip
    return told


@dataclass(frozen=True)
class Month:
    """AI calls of a month. `cost` None: no price is known."""

    calls: int
    tokens: int
    cost: float | None


def read_months(page: Page, first: date) -> Mapping[str, Month]:
    """AI calls by month of the operators' zone, from a day on.

    Raises:
        OpsError: there is no log that could be read.
    """
    env = page.env
    since = datetime.combine(first, time(), env.zone)
    wanted = Conditions().holds(tokens.CALL, tokens.MESSAGE).within(since, None)
    with reading(find_logs(Path(env.logs.app)), env.zone, since=since) as source:
        source.pick(tokens.COLUMNS, wanted.sql, wanted.parameters, wanted.needles)
        uses = tokens.read_use(source)
    prices = env.ai_providers.prices if env.has("ai_providers") else {}
    by_month = defaultdict[str, list[tokens.Use]](list)
    for use in uses:
        by_month[f"{use.day:%Y-%m}"].append(use)
    return {month: Month(sum(use.calls for use in found), sum(use.total for use in found),
                         sum(use.cost(prices) or 0.0 for use in found) if prices else None)
            for month, found in by_month.items()}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A month: what the cloud took, and AI; "?" is not known."""

    month: str
    cloud: str
    calls: str
    tokens: str
    ai: str
    total: str


COLUMNS = ("month", "cloud", "AI calls", "AI tokens", "AI", "together")
UNKNOWN = "not measured"


def sums(page: Page, first: date, bill: Bill, months: Mapping[str, Month]) -> list[Sum]:
    """Of each month from a day on, the earliest first: what can be read today; of a month whose log and bill are gone
    what the review of that time had read."""
    known, today = _of_the_past(page), datetime.now(page.env.zone).date()
    return [_merged(_today(page, month, bill, months), known.get(month)) for month in _names(first, today)]


def _today(page: Page, month: str, bill: Bill, months: Mapping[str, Month]) -> Sum:
    env, ai = page.env, months.get(month)
    cloud_currency = env.cloud.currency if env.has("cloud") else ""
    ai_currency = env.ai_providers.currency if env.has("ai_providers") else ""
    spent, cost = bill.get(month), ai.cost if ai else None
    same = cloud_currency == ai_currency or not cloud_currency or not ai_currency
    parts = [amount for amount in (spent, cost) if amount is not None]
    part = "" if len(parts) == 2 else "at least "  # the other one is not nothing
    together = f"{part}{sum(parts):,.2f} {ai_currency or cloud_currency}" if parts and same else UNKNOWN
    return Sum(month, f"{spent:,.2f} {cloud_currency}" if spent is not None else UNKNOWN,
               f"{ai.calls:,}" if ai else UNKNOWN, f"{ai.tokens:,}" if ai else UNKNOWN,
               f"{cost:,.2f} {ai_currency}" if cost is not None else UNKNOWN, together)  # fmt: skip


def _merged(now: Sum, then: Sum | None) -> Sum:
    """Where today knows nothing of a month, the review of that time does."""
    return then if then and (now.cloud, now.calls) == (UNKNOWN, UNKNOWN) else now


def _of_the_past(page: Page) -> Mapping[str, Sum]:
    found = dict[str, Sum]()
    reports = filed(page.env.reports_directory, page.env.name, render.key(page.report))
    for _, one in zip(range(MOST_REPORTS), reports, strict=False):
        for row in one.rows(TABLE):
            if len(row) == len(COLUMNS):
                found.setdefault(row[0], Sum(*row))
    return found


def _names(first: date, last: date) -> Iterator[str]:
    """`2026-11`, of each month of a span."""
    year, month = first.year, first.month
    while (year, month) <= (last.year, last.month):
        yield f"{year}-{month:02d}"
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)


def tell_sums(page: Page, found: list[Sum]) -> None:
    """The table, and a picture."""
    page.report.table(TABLE, COLUMNS, [tuple(vars(one).values()) for one in found])
    lines = [Bar(one.month, (_number(one.total),), one.total) for one in found]
    page.report.attach(Evidence("Cost by month", svg=bars(lines)))
    if found and found[-1].total == UNKNOWN:
        page.not_measured("what this month cost", "neither a bill nor prices of AI models could be read",
                          "add [cloud], and [ai_providers] with prices, to the environment's TOML")  # fmt: skip


def _number(text: str) -> float:
    found = re.search(r"\d[\d,]*\.?\d*", text)
    return float(found[0].replace(",", "")) if found else 0.0
