"""The review of costs (§7.1)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.ai_providers.usage import judge_usage
from flows.infrastructure.images.resources import review_cloud, review_docker
from flows.routine.page import Page
from flows.routine.savings import judge_savings
from flows.routine.sources.past import MONTHLY, judge_last
from runbook.page import render
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report
from runbook.run import runbook
from tasks.logs.figures import tokens
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.samples import begins_at
from tasks.logs.reading.source import count_undated, reading
from tasks.reports.past import filed


@flow(name="review-costs", flow_run_name="review-costs {environment}")
def review_costs(environment: str, months: Annotated[int, Field(ge=1, le=12)] = 4) -> Report:
    """コスト最適化レビュー: クラウドリソース・AIトークン・未使用リソース (§7.1, §7.4)

    What the environment costs, on one page: the cloud's bill and what in it does nothing, containers that take far less
    than they are given, AI tokens against the budget, the sums of the last months; and what is of no use any more
    (databases that restores replaced, old backups and logs, indexes, Docker's leftovers), with bytes and the runbook
    that gives it back. Run it quarterly; the checklist cost_review takes its page.

    It changes nothing. What has no source (no [cloud], no prices) is told as not measured and is in no sum; of a month
    whose log or bill is gone the sum is that of an earlier review, and where a part of it was never seen, or a model
    has no price, it is "at least" that. The four months hold the three of a quarter whole, and the present one so far.

    Args:
        environment: 対象の環境
        months: 合計する月数 (今月を含む)
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


def _months_ago(today: date, months: int) -> date:
    """The first of a month."""
    number = today.year * 12 + today.month - 1 - months
    return date(number // 12, number % 12 + 1, 1)


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
    elif env.has("docker"):
        judge_last(page, "cloud resources", "review-resources", MONTHLY)
    if not bill and not env.has("cloud"):
        page.names("cloud", "docker")
    return bill


def judge_tokens(page: Page, month: str = "") -> str | None:
    """Of this month, against the budget. None in a month without any call tells nothing."""
    if not page.names("ai_providers", "logs"):
        return None
    told = page.part("AI tokens", lambda: judge_usage(page.report, page.env, month))
    if told and told.endswith(" in 0 calls"):
        message = page.env.logs.ai_message
        why = f"the log has no line “{message}” of this month" if message else "[logs] ai_message is not configured"
        page.not_measured("AI tokens", why, "is it the application's own log? docs/ai-providers.md")
    return told


@dataclass(frozen=True)
class Month:
    """AI calls of a month. `cost` None: no price is known. `whole`: the log has all of it; `priced`: every call's model
    has a price."""

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
    began, prices = (
        begins_at(files[0], env.logs.field("timestamp")),
        env.ai_providers.prices if env.has("ai_providers") else {},
    )
    by_month = defaultdict[str, list[tokens.Use]](list)
    for use in uses:
        by_month[f"{use.day:%Y-%m}"].append(use)

    def month(name: str, found: list[tokens.Use]) -> Month:
        costs = [cost for use in found if (cost := use.cost(prices)) is not None]
        whole = began is not None and began <= datetime.fromisoformat(f"{name}-01").replace(tzinfo=env.zone)
        return Month(
            sum(use.calls for use in found),
            sum(use.total for use in found),
            sum(costs) if costs else None,
            whole and not damaged,
            len(costs) == len(found) and not any(use.tokenless or use.unsplit for use in found),
        )

    return {name: month(name, found) for name, found in by_month.items()}


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
UNKNOWN, AT_LEAST = "not measured", "at least "


def monthly_sums(page: Page, first: date, bill: Bill, months: Mapping[str, Month]) -> list[Sum]:
    """Of each month from a day on, the earliest first: what can be read today; of a month whose log or bill is gone, or
    there in part only, what a review of that time had read."""
    known, today = _of_the_past(page), datetime.now(page.env.zone).date()
    found = [_today(page, month, bill, months) for month in _names(first, today)]
    return [_merged(one, known[one.month]) if one.month in known else one for one in found]


def _today(page: Page, month: str, bill: Bill, months: Mapping[str, Month]) -> Sum:
    env, ai = page.env, months.get(month)
    cloud, calls, used, cost = UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN
    if (spent := bill.get(month)) is not None:
        cloud = f"{spent:,.2f} {env.cloud.currency}"
    current = f"{datetime.now(env.zone):%Y-%m}" == month  # which nobody takes for a whole one
    if ai:
        least = "" if ai.whole or current else AT_LEAST
        calls, used = f"{least}{ai.calls:,}", f"{least}{ai.tokens:,}"
        if ai.cost is not None:
            cost = f"{least if ai.priced else AT_LEAST}{ai.cost:,.2f} {env.ai_providers.currency}"
    return Sum(month, cloud, calls, used, cost, _together(cloud, cost))


def _together(*parts: str) -> str:
    """Of amounts as they are shown; one that is not known is not nothing."""
    known = [part for part in parts if part != UNKNOWN]
    currencies = {part.rpartition(" ")[2] for part in known}
    if len(currencies) != 1:
        return UNKNOWN
    least = AT_LEAST if len(known) < len(parts) or any(part.startswith(AT_LEAST) for part in known) else ""
    return f"{least}{sum(map(_number, known)):,.2f} {currencies.pop()}"


def _merged(now: Sum, then: Sum) -> Sum:
    """The bill, and what AI took, each from whoever knew more of it."""
    cloud = max(now.cloud, then.cloud, key=_known)
    ai = max(now, then, key=lambda one: _known(one.calls))
    return Sum(now.month, cloud, ai.calls, ai.tokens, ai.ai, _together(cloud, ai.ai))


def _known(text: str) -> tuple[bool, bool, float]:
    whole = not text.startswith(AT_LEAST)
    return text != UNKNOWN, whole, 0.0 if whole else _number(text)


def _of_the_past(page: Page) -> Mapping[str, Sum]:
    """What reviews before this one read, the newest first; one within a month knew a part of it."""
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
    if found and found[-1].total == UNKNOWN and any(map(page.env.has, ("cloud", "ai_providers"))):
        page.not_measured(
            "what this month cost",
            "neither a bill nor prices of AI models could be read",
            "add [cloud], and [ai_providers] with prices, to the environment's TOML",
        )


def _number(text: str) -> float:
    found = re.search(r"\d[\d,]*\.?\d*", text)
    return float(found[0].replace(",", "")) if found else 0.0
