"""The review of costs (§7.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.ai_providers.usage import judge_usage
from flows.infrastructure.images.resources import review_cloud, review_docker
from flows.routine.page import Page
from flows.routine.savings import judge_savings
from flows.routine.sources.past import MONTHLY, judge_last
from runbook.flow import flow
from runbook.page import render
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures import tokens
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import count_undated, reading
from tasks.reports.past import filed

if TYPE_CHECKING:
    from pandas import DataFrame


@flow(name="review-costs", flow_run_name=RunName("review-costs {environment} {months}-months"))
def review_costs(environment: str, months: Annotated[int, Field(ge=1, le=12)] = 4) -> Report:
    """コスト最適化レビュー: クラウドリソース・AIトークン・未使用リソース (§7.1, §7.4)

    Shows the environment's costs on one page: the cloud's bill and idle resources, oversized containers, AI tokens
    against the budget, and the sums of the last months. It also lists unused data (databases replaced by restores, old
    backups and logs, indexes, Docker leftovers) with its size and the runbook that deletes it. Run it quarterly, before
    the checklist cost_review.

    It changes nothing. A value without a source (no [cloud], no prices) is "not measured" and in no sum. If the log or
    bill of a month is deleted, the sum is that of an earlier review. "At least" marks a sum with a missing part, or
    with a model without a price. Four months cover a whole quarter and the current month.

    Args:
        environment: Environment (lab, staging, production …)
        months: Months to sum up, including this one
    """
    env = Environment.find(environment)
    with runbook("Review costs", env) as report:
        page = Page.of(report, env)
        first = _months_ago(datetime.now(env.zone).date(), months - 1)
        bill = judge_resources(page)
        report.fact("AI tokens of this month", judge_tokens(page) or UNKNOWN)
        by_month = page.part("AI tokens by month", lambda: read_months(page, first)) if env.has("logs") else None
        sums = monthly_sums(page, first, bill, by_month or {})
        tell_sums(page, sums)
        saved = judge_savings(page)
        report.fact("what could be saved", saved)
        report.outcome = f"{sums[-1].month}: {sums[-1].total}; to be saved: {saved}"
    return report


def months_of(first: date, last: date) -> list[str]:
    """`2026-11` for each month of a span."""
    import pandas as pd

    return [str(month) for month in pd.period_range(first, last, freq="M")]


def _months_ago(today: date, months: int) -> date:
    """The first of a month."""
    number = today.year * 12 + today.month - 1 - months
    return date(number // 12, number % 12 + 1, 1)


TABLE = "Sums by month"
SAMPLES, MOST_REPORTS = 2, 24
Bill = Mapping[str, float]


def judge_resources(page: Page) -> Bill:
    """Resources of the cloud account and the Docker Engine, or the last review-resources. Returns the bill by month."""
    env, bill = page.env, dict[str, float]()
    if env.has("docker"):
        page.part("Docker", lambda: review_docker(page.report, env, SAMPLES))
    if env.has("cloud"):
        bill = dict(review_cloud(page.report, env))
        if not bill:
            page.not_measured(
                "the cloud's bill", "it could not be read, or is empty", "fix the findings about the cloud"
            )
    elif env.has("docker"):
        judge_last(page, "cloud resources", "review-resources", MONTHLY)
    if not bill and not env.has("cloud"):
        page.names("cloud", "docker")
    return bill


def judge_tokens(page: Page, month: str = "") -> str | None:
    """AI tokens of a month against the budget. A month without a call is not measured."""
    if not page.names("ai_providers", "logs"):
        return None
    told = page.part("AI tokens", lambda: judge_usage(page.report, page.env, month))
    if told and told.endswith(" in 0 calls"):
        message = page.env.logs.ai_message
        why = f"the log has no line “{message}” in this month" if message else "[logs] ai_message is not configured"
        page.not_measured("AI tokens", why, "check that [logs] names the application's log: docs/ai-providers.md")
    return told


@dataclass(frozen=True)
class Month:
    """AI calls of a month. `cost` None: no price is known. `whole`: the log covers the month; `priced`: every call's
    model has a price."""

    calls: int
    tokens: int
    cost: float | None
    whole: bool
    priced: bool


def read_months(page: Page, first: date) -> Mapping[str, Month]:
    """AI calls by month of the operators' zone, from a day on.

    Raises:
        OpsError: there is no log that could be read.
    """
    env = page.env
    since = datetime.combine(first, time(), env.zone)
    wanted = tokens.calls(page.env.logs.ai_message).within(since, None)
    files = find_logs(Path(env.logs.need("app")))
    with reading(files, env.zone, since=since, names=env.logs.fields) as source:
        bad = source.pick_each(picked=wanted.choice(tokens.COLUMNS), undated=wanted.undated())
        uses = tokens.read_use(source)
        damaged = bool(bad or source.unreadable or count_undated(source))
    began = begins_at(files[0], env.logs.field("timestamp"))
    prices = env.ai_providers.prices if env.has("ai_providers") else {}
    found = tokens.frame_of(uses, prices)
    months = found.groupby(found["day"].map("{:%Y-%m}".format))
    return {str(name): _month(str(name), rows, began, damaged, env.zone) for name, rows in months}


def _month(name: str, found: DataFrame, began: datetime | None, damaged: bool, zone: tzinfo) -> Month:
    begins = datetime.fromisoformat(f"{name}-01").replace(tzinfo=zone)
    priced = found["cost"].notna()
    return Month(
        int(found["calls"].sum()),
        int(found["total"].sum()),
        float(found["cost"].sum()) if priced.any() else None,
        began is not None and began <= begins and not damaged,
        bool(priced.all()) and not found[["tokenless", "unsplit"]].any(axis=None),
    )


@dataclass(frozen=True)
class Sum:
    """The costs of a month, as text."""

    month: str
    cloud: str
    calls: str
    tokens: str
    ai: str
    total: str


COLUMNS = ("month", "cloud", "AI calls", "AI tokens", "AI", "together")
UNKNOWN, AT_LEAST = "not measured", "at least "


def monthly_sums(page: Page, first: date, bill: Bill, months: Mapping[str, Month]) -> list[Sum]:
    """The costs of each month from a day on, the earliest first. If the log or bill of a month is missing or
    incomplete, the values are those of an earlier review."""
    known, today = _of_the_past(page), datetime.now(page.env.zone).date()
    found = [_today(page, month, bill, months) for month in months_of(first, today)]
    return [_merged(one, known[one.month]) if one.month in known else one for one in found]


def _today(page: Page, month: str, bill: Bill, months: Mapping[str, Month]) -> Sum:
    env, ai = page.env, months.get(month)
    cloud, calls, used, cost = UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN
    if (spent := bill.get(month)) is not None:
        cloud = f"{spent:,.2f} {env.cloud.currency}"
    current = f"{datetime.now(env.zone):%Y-%m}" == month  # it is incomplete for everybody to see
    if ai:
        least = "" if ai.whole or current else AT_LEAST
        calls, used = f"{least}{ai.calls:,}", f"{least}{ai.tokens:,}"
        if ai.cost is not None:
            cost = f"{least if ai.priced else AT_LEAST}{ai.cost:,.2f} {env.ai_providers.currency}"
    return Sum(month, cloud, calls, used, cost, _together(cloud, cost))


def _together(*parts: str) -> str:
    """The sum of amounts as text. An unknown amount makes it "at least"."""
    known = [part for part in parts if part != UNKNOWN]
    currencies = {part.rpartition(" ")[2] for part in known}
    if len(currencies) != 1:
        return UNKNOWN
    least = AT_LEAST if len(known) < len(parts) or any(part.startswith(AT_LEAST) for part in known) else ""
    return f"{least}{sum(map(_number, known)):,.2f} {currencies.pop()}"


def _merged(now: Sum, then: Sum) -> Sum:
    """The bill and the AI costs, each from the review that knew more."""
    cloud = max(now.cloud, then.cloud, key=_known)
    ai = max(now, then, key=lambda one: _known(one.calls))
    return Sum(now.month, cloud, ai.calls, ai.tokens, ai.ai, _together(cloud, ai.ai))


def _known(text: str) -> tuple[bool, bool, float]:
    whole = not text.startswith(AT_LEAST)
    return text != UNKNOWN, whole, 0.0 if whole else _number(text)


def _of_the_past(page: Page) -> Mapping[str, Sum]:
    """The values of earlier reviews. A review within a month knew a part of it."""
    found = dict[str, Sum]()
    reports = filed(page.env.reports_directory, page.env.name, render.key(page.report))
    for _, one in zip(range(MOST_REPORTS), reports, strict=False):
        within = f"{one.started.astimezone(page.env.zone):%Y-%m}"
        for row in one.rows(TABLE):
            if len(row) == len(COLUMNS):
                then = Sum(row[0], *map(_least, row[1:])) if row[0] == within else Sum(*row)
                found[row[0]] = _merged(found[row[0]], then) if row[0] in found else then
    return found


def _least(text: str) -> str:
    return text if text == UNKNOWN or text.startswith(AT_LEAST) else AT_LEAST + text


def tell_sums(page: Page, found: list[Sum]) -> None:
    """The table and a chart."""
    import pandas as pd

    rows = [tuple(vars(one).values()) for one in found]
    page.report.table(TABLE, COLUMNS, rows, csv=pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False))
    lines = [Bar(one.month, (_number(one.total),), one.total) for one in found]
    currencies = {one.total.rpartition(" ")[2] for one in found if one.total != UNKNOWN}
    page.report.attach(Evidence("Cost by month", svg=bars(lines, currencies.pop() if len(currencies) == 1 else "")))
    if found and found[-1].total == UNKNOWN and any(map(page.env.has, ("cloud", "ai_providers"))):
        page.not_measured(
            "what this month cost",
            "neither a bill nor prices of AI models could be read",
            "add [cloud], and [ai_providers] with prices, to the environment's TOML",
        )


def _number(text: str) -> float:
    found = re.search(r"\d[\d,]*\.?\d*", text)
    return float(found[0].replace(",", "")) if found else 0.0
