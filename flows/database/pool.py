"""Judgement of the application's connection pool (§1.5): its values, and its sum against the server's places."""

from __future__ import annotations

from blocks.environment import Environment
from runbook.report import Report, Status
from tasks.postgres.connections import Activity, Limits
from tasks.postgres.pool import ECHO, OVERFLOW, RECOMMENDED, RECYCLE, SIZE, Pool

# The manual's alarm on connections (appendix).
ALARM_RATIO = 0.8


def judge_values(report: Report, env: Environment, pool: Pool) -> None:
    """Each value against the manual's."""
    rows = []
    for name, manual in RECOMMENDED.items():
        found = pool.values.get(name)
        rows.append((name, found.text if found else "not found", manual, found.source if found else ""))
        if name == ECHO:
            continue
        if not found:
            where = f"set {name} in {env.application.backend_directory}/.env"
            report.warn(f"{name} not measured", where, value="not found", expected=manual)
        elif found.number is None:
            report.expect(name, False, f"correct it in {found.source}", value=found.text, expected="a number")
        else:
            hint = f"set it to {manual} in {found.source} and restart the backend, or record why it differs"
            same = found.number == float(manual)
            report.expect(name, same, hint, value=found.text, expected=manual, otherwise=Status.WARN)
    report.table("Pool", ("setting", "application", "manual", "read from"), rows)
    _judge_echo(report, env, pool)


def _judge_echo(report: Report, env: Environment, pool: Pool) -> None:
    found = pool.values.get(ECHO)
    if not found or found.is_on is None:
        hint = f"set {ECHO}=false in {env.application.backend_directory}/.env"
        report.warn(f"{ECHO} not measured", hint, value=found.text if found else "not found", expected="False")
        return
    report.expect(
        ECHO,
        not found.is_on or env.tier == "development",
        f"set it to false in {found.source} and restart the backend: every statement is written to the log",
        value=found.text,
        expected="False" if env.tier != "development" else "any, in development",
        otherwise=Status.CRITICAL if env.tier == "production" else Status.WARN,
    )


def judge_recycle(report: Report, limits: Limits, pool: Pool) -> None:
    """A server that ends idle sessions earlier than the pool renews them leaves it dead ones."""
    found, limit = pool.values.get(RECYCLE), limits.idle_session_timeout_seconds
    if found and found.number is not None and limit > 0:
        report.expect(
            "recycle before the server ends idle sessions",
            0 <= found.number < limit,
            f"make {RECYCLE} shorter than idle_session_timeout, or the pool hands out dead connections",
            value=f"{found.text} s",
            expected=f"less than {limit:g} s",
            otherwise=Status.WARN,
        )


def judge_total(report: Report, env: Environment, activity: Activity, pool: Pool, workers: int) -> None:
    """What all workers may open at once, against the places that the server has for them."""
    count = workers or int((pool.workers.number if pool.workers else None) or 0)
    if not count:
        hint = "launch it with workers=… (the backend was not found running on this host)"
        report.warn("workers not measured", hint, value="1 is assumed", expected="the number of worker processes")
        count = 1
    size, overflow = (pool.values[name].number if name in pool.values else None for name in (SIZE, OVERFLOW))
    if size is None or overflow is None:
        report.warn("connections at most: not measured", f"set {SIZE} and {OVERFLOW} where the application reads them")
    elif size <= 0 or overflow < 0:  # SQLAlchemy's "no limit"
        report.expect("connections at most", False, f"set {SIZE} above 0 and {OVERFLOW} to 0 or more", value="no limit")
    else:
        total = int((size + overflow) * count)
        shown = f"({size:g} + {overflow:g}) × {count} workers = {total} of {activity.limits.most}"
        report.fact("connections at most", shown)
        _judge_room(report, env, activity, total, shown)


def _judge_room(report: Report, env: Environment, activity: Activity, total: int, shown: str) -> None:
    limits, user = activity.limits, env.postgres.user
    others = sum(session.user != user and not session.superuser for session in activity.clients)
    free = min(limits.application, limits.ordinary - others)
    report.expect(
        "connections at most",
        total <= free,
        "lower the pool or the workers, put PgBouncer between, or raise max_connections (needs a restart)",
        value=shown,
        expected=f"at most {free}: {limits.most} less {limits.reserved} reserved, {others} of others, and own limits",
    )
    if free >= total > limits.most * ALARM_RATIO:
        report.warn("room beside the pool", f"lower the pool: the alarm is at {ALARM_RATIO:.0%}", value=shown)
    used = sum(session.user == user for session in activity.clients)
    report.expect(
        "the role's connections now",
        used <= total,
        "launch it with the right workers=…, or find out who else logs in as the application's role",
        value=used,
        expected=f"at most {total}",
        otherwise=Status.WARN,
    )
