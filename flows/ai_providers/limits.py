"""Rate limits of AI calls: the limiter's counters in Redis, and refusals (429) in the logs (§5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.ai_providers.errors import report_errors
from flows.logs.findings import report_files_read, report_undated
from flows.redis.master import judge_master
from runbook.flow import flow
from runbook.masking import masked
from runbook.page.plots import Bar, bars
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.logs.figures import refusals
from tasks.logs.figures.refusals import Refusals
from tasks.logs.reading.conditions import Conditions, parse_moment
from tasks.logs.reading.files import find_logs
from tasks.logs.reading.source import by_hour, offset, reading, utc
from tasks.redis.counters import CountedCalls, Counter, read_counters
from tasks.redis.sentinels import read_sentinels

NEAR_RATIO = 0.8
COUNTERS_SECONDS = 60.0
# A retry storm whose last minute is not older than this is still active.
NOW = timedelta(minutes=15)
OUTCOME = ("counters", "refusals")


@flow(name="check-rate-limits", flow_run_name=RunName("check-rate-limits {environment} {hours}h {until}"))
def check_rate_limits(
    environment: str,
    hours: Annotated[int, Field(ge=1, le=24 * 31)] = 24,
    until: str = "",
    storm: Annotated[int, Field(ge=2)] = 20,
) -> Report:
    """レート制限管理: レート制限の使用状況・プロバイダー側のレート制限 (§5.3)

    Checks the limiter's counters in Redis: users over or near the limit, counters that never expire, that outlive their
    window, or that are no number. Checks refusals (429) in the application's log, of users and by providers, and retry
    storms (retries without a wait). Run it daily, and first when users are refused.

    It changes nothing. A counter that never expires locks its user out permanently once it is over the limit: CRITICAL,
    like an active retry storm. Evidence: counters, refusals by user and provider, and by hour.

    Departs from the manual: with its GET before INCR, concurrent requests exceed the limit. With its EXPIRE at every
    request, a user who continues is never admitted again. One check cannot recognise such counters: use INCR, then
    EXPIRE … NX (docs/ai-providers.md).

    Args:
        environment: Environment (lab, staging, production …)
        hours: Hours of logs to include
        until: End of the period (e.g. 2026-02-15 03:00 or 2026-02-15 03:00+09:00; without a zone: the environment's).
            Empty: now
        storm: This many 429 answers or more in a minute count as a retry storm of a user or provider
    """
    env = Environment.find(environment)
    with runbook("Check rate limits", env) as report:
        end = parse_moment(until, env.zone, "until") or datetime.now(UTC)
        with report_errors(report, "the limiter's counters"):
            _judge_counters(report, env)
        with report_errors(report, "refusals in the log"):
            _judge_refusals(report, env, end - timedelta(hours=hours), end, storm)
        report.outcome = "; ".join(f"{name}: {value}" for name, value in report.facts.items() if name in OUTCOME)
    return report


def _judge_counters(report: Report, env: Environment) -> None:
    limits = env.ai_providers.rate_limits if env.has("ai_providers") else {}
    if not limits:
        report.warn(
            "the limiter's counters",
            'add [ai_providers] rate_limits = { "rate_limit:ai:" = [100, 3600] }: key prefix → requests, seconds',
            value="not known: no limit is configured",
        )
        return
    block = judge_master(report, env.redis, read_sentinels(env.redis), changes=False)
    found = read_counters(block, limits, NEAR_RATIO, COUNTERS_SECONDS)
    total = sum(counted.keys for counted in found.prefixes)
    report.fact("counters", f"{total:,} on {block.address}")
    report.prefer(
        "all counters were read",
        found.is_complete,
        "run this again when Redis is less busy",
        value=f"{total:,} in {found.seconds:.1f} s",
    )
    for counted in found.prefixes:
        _judge_prefix(report, counted)
    _attach_counters(report, found.prefixes)


def _judge_prefix(report: Report, found: CountedCalls) -> None:
    limit = f"{found.most:,} in {found.window_seconds:,} s"
    report.prefer(
        f"{found.prefix} over the limit",
        not found.over.count,
        "check who they are, and whether the limit fits normal use: they are refused now",
        value=_who(found.over.first, found.over.count),
        expected=limit,
    )
    report.prefer(
        f"{found.prefix} near the limit",
        not found.near.count,
        "nothing to do yet: at this rate they are refused soon",
        expected=f"< {NEAR_RATIO:.0%} of {limit}",
        value=_who(found.near.first, found.near.count),
    )
    locked = found.locked
    report.require(
        f"{found.prefix} every counter expires",
        not found.lasting.count,
        f"run EXPIRE {found.window_seconds} on each: only INCR succeeded; the limiter must set both in one MULTI",
        value=_who(locked.first or found.lasting.first, found.lasting.count)
        + (f"; {locked.count:,} of them locked out permanently" if locked.count else ""),
        worst=Status.CRITICAL if locked.count else Status.WARN,
    )
    report.prefer(
        f"{found.prefix} every counter expires with its window",
        not found.long.count,
        "correct the limiter's EXPIRE, or the window in [ai_providers] rate_limits",
        value=_who(found.long.first, found.long.count),
        expected=f"≤ {found.window_seconds:,} s",
    )
    report.prefer(
        f"{found.prefix} every counter is a number",
        not found.unreadable.count,
        "find the program that writes under this prefix, or correct the prefix: the limiter fails there",
        value=_who(found.unreadable.first, found.unreadable.count),
    )


def _who(first: Sequence[Counter], count: int) -> str:
    """The number of counters, and those with most requests."""
    if not count:
        return "none"
    worst = sorted(first, key=lambda one: -(one.count or 0))[:3]
    return f"{count:,}: {', '.join(masked(one.key) for one in worst)}{' …' if count > len(worst) else ''}"


def _attach_counters(report: Report, prefixes: Sequence[CountedCalls]) -> None:
    rows = []
    for found in prefixes:
        noted = {
            (one.database, one.key): one
            for some in (found.over, found.near, found.lasting, found.long)
            for one in some.first
        }
        for one in sorted(noted.values(), key=lambda one: -(one.count or 0)):
            ttl = "never expires" if one.ttl_seconds < 0 else f"{one.ttl_seconds:,.0f} s"
            rows.append((found.prefix, one.database, masked(one.key), one.count, f"{found.most:,}", ttl))
    if rows:
        report.table(
            "Counters to check", ("prefix", "database", "key", "requests", "limit", "expires in"), rows, most=60
        )


def _judge_refusals(report: Report, env: Environment, since: datetime, end: datetime, storm: int) -> None:
    wanted = Conditions().holds(refusals.refused(env.logs.ai_message)).within(since, end)
    with reading(find_logs(Path(env.logs.need("app"))), env.zone, since=since, names=env.logs.fields) as source:
        columns = refusals.columns(env.logs.ai_message)
        bad = source.pick_each(picked=wanted.choice(columns), undated=wanted.undated())
        found, calls = refusals.read_refusals(source)
        hours = by_hour(source, refusals.COUNTS, refusals.REFUSED)
        report_files_read(report, source, bad)
        report_undated(report, source)
    users, providers = ([one for one in found if one.kind == kind] for kind in ("user", "provider"))
    counts = sum(one.count for one in users), sum(one.count for one in providers)
    report.fact("refusals", f"{counts[0]:,} of users, {counts[1]:,} by providers, in {calls:,} AI calls")
    report.prefer(
        "users were refused (429)",
        not users,
        "check who they are: the program of one user, or a limit that is too low",
        value=_most(users),
        expected="none",
    )
    report.prefer(
        "providers refused (429)",
        not providers,
        "request a higher quota, or spread the calls; until then the application falls back",
        value=_most(providers),
        expected="none",
    )
    _judge_storms(report, [one for one in found if one.most >= storm], end, storm)
    if found:
        _attach_refusals(report, env, found, hours)


def _attach_refusals(
    report: Report, env: Environment, found: Sequence[Refusals], hours: Sequence[tuple[datetime, Sequence[int]]]
) -> None:
    """A table of the refusals, and a plot by hour."""
    report.table(
        "Refusals (429)",
        ("of", "name", "count", "first", "last", "most per minute", "at"),
        [
            (
                one.kind,
                masked(one.who),
                f"{one.count:,}",
                f"{one.first:%m-%d %H:%M:%S}",
                f"{one.last:%m-%d %H:%M:%S}",
                one.most,
                f"{one.most_at:%m-%d %H:%M:%S}",
            )
            for one in found
        ],
        most=30,
    )
    drawn = [
        Bar(f"{hour:%m-%d %H:00} {offset(hour)}", (sum(both),), f"{both[0]:,} users, {both[1]:,} providers")
        for hour, both in hours[-24 * 7 :]
    ]
    report.attach(Evidence(f"Refusals by hour ({env.zone.key}), without empty hours", svg=bars(drawn)))


def _judge_storms(report: Report, storms: Sequence[Refusals], end: datetime, storm: int) -> None:
    """Retries without a wait worsen the overload: the manual waits 4 to 60 s between 5 attempts."""
    active = [one for one in storms if one.ended >= utc(end) - NOW]
    worst = storms[0] if storms else None
    value = (
        f"{len(storms)}; the worst: {worst.most:,} per minute, {worst.kind} {masked(worst.who)}, at "
        f"{worst.most_at:%m-%d %H:%M:%S}"
        if worst
        else "none"
    )
    report.require(
        "retry storms",
        not storms,
        "block this user or program; then make it back off (4 to 60 s, increasing) and stop after 5 attempts",
        value=value + ("; still active" if active else ""),
        expected=f"< {storm} per minute",
        worst=Status.CRITICAL if active else Status.WARN,
    )


def _most(found: Sequence[Refusals]) -> str:
    if not found:
        return "none"
    ranked = sorted(found, key=lambda one: -one.count)[:3]
    of = ", ".join(f"{masked(one.who)} {one.count:,}" for one in ranked)
    return f"{sum(one.count for one in found):,} times: {of}{' …' if len(found) > 3 else ''}"
