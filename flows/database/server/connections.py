"""Connections to the database and the application's pool (§1.5)."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.database.server.sessions import MANUAL_IDLE_SECONDS, MOST_ROWS, judge_blocked, judge_idle, judge_used
from flows.pinned import pin_database
from runbook import metrics
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, duration
from tasks.postgres.sessions.closing import close_sessions, why_kept
from tasks.postgres.sessions.connections import ClientSession, ConnectionLimits, SessionActivity, read_activity
from tasks.postgres.sessions.pool import ECHO, OVERFLOW, RECOMMENDED, RECYCLE, SIZE, Pool, read_pool

LEAST_SECONDS = 10


@flow(name="check-connections", flow_run_name=RunName("check-connections {environment}"))
def check_connections(environment: str) -> Report:
    """PostgreSQL側の接続数設定: 接続数の確認 (§1.5)

    Counts the sessions by database, user, application and state against `max_connections`. Lists idle sessions,
    sessions idle in a transaction, and who blocks whom with which statement. Run it daily, and first when the
    application reports database errors.

    It changes nothing; there is nothing to undo. Evidence: the tables of sessions and the tree of waiting ones.

    Departs from the manual: idle connections are normal for a pool; sessions idle *in a transaction* cause harm. Only
    clients count against `max_connections`: WAL senders and background processes have separate limits.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check connections", env) as report:
        activity = read_activity(env.postgres)
        judge_used(report, activity)
        judge_idle(report, activity, env.postgres.database)
        judge_blocked(report, activity, env.postgres.database)
        if activity.hidden:
            report.warn(
                "not measured",
                f"GRANT pg_read_all_stats TO {env.postgres.admin_user}, and switch track_activities on",
                value=f"{activity.hidden} sessions hide their state: the numbers above are too low",
            )
        report.outcome = f"{len(activity.clients) + 1} of {activity.limits.most} connections are in use"
    return report


@flow(name="close-idle-connections", flow_run_name=RunName("close-idle-connections {environment}"))
def close_idle_connections(
    environment: str,
    min_seconds: Annotated[int, Field(ge=LEAST_SECONDS)] = MANUAL_IDLE_SECONDS,
    also_idle: bool = False,
    keep_applications: tuple[str, ...] = (),
    pool_applications: tuple[str, ...] = (),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """PostgreSQL側の接続数設定: アイドル接続の切断 (§1.5)

    Ends sessions of the environment's database that have been idle in a transaction for `min_seconds`, blockers first;
    with `also_idle` also those idle outside a transaction. Run it when check-connections reports them. Each session is
    checked again when it is ended: one that works again is kept.

    It cannot be undone: a session's uncommitted writes are rolled back. Evidence: the closed and the kept sessions,
    with the reasons.

    Departs from the manual: sessions of other databases are counted, never ended. It keeps a pool's idle connections,
    replication, superusers, backup programs, sessions with advisory locks, and sessions whose last statement is LISTEN
    (an earlier LISTEN is not visible).

    Args:
        environment: Environment (lab, staging, production …)
        min_seconds: Only connections that have been idle at least this long, in seconds
        also_idle: Include idle connections outside a transaction
        keep_applications: application_name values to leave connected. May be empty
        pool_applications: application_name values of the connection pools (empty: those of [postgres]). Their idle
            connections outside a transaction stay connected
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Close idle connections", env, confirm, plan, changes=True) as report:
        if min_seconds < LEAST_SECONDS:
            raise OpsError(f"min_seconds is {min_seconds}", f"choose {LEAST_SECONDS} or more: clients pause that long")
        activity = read_activity(env.postgres)
        wanted, elsewhere = _find_idle(activity, env.postgres.database, min_seconds, also_idle)
        if elsewhere:
            report.fact("as idle in other databases (kept)", elsewhere)
        chosen, kept = _choose(
            activity, wanted, keep_applications, pool_applications or tuple(env.postgres.pool_applications)
        )
        _report_kept(report, kept)
        if not chosen:
            report.outcome = "nothing to close"
            return report
        closing = Change(
            close_sessions.bind(env.postgres, chosen, min_seconds),
            "close session",
            _described(chosen[0]),
            more=[PlannedStep("close session", _described(session)) for session in chosen[1:]],
            pins=[lambda report: pin_database(report, env.postgres)],
        )
        idle = all(session.is_idle for session in chosen)
        effect = Effect(
            f"closes {counted(len(chosen), 'idle session')}",
            "not needed, clients connect again",
            "" if idle else "open transactions are rolled back",
        )
        with carrying_out(report, closing, effect=effect) as carry:
            done = carry(closing)
        report.table("Closed", ("session", "result"), [(_described(item.session), item.why) for item in done])
        if stuck := [str(item.session.pid) for item in done if item.is_stuck]:
            hint = "run this again; if they remain, inspect these processes on the server"
            report.warn("sessions that do not end", hint, value=", ".join(stuck))
        report.outcome = f"{sum(item.closed for item in done)} of {len(done)} sessions closed"
    return report


@flow(name="check-pool-settings", flow_run_name=RunName("check-pool-settings {environment}"))
def check_pool_settings(environment: str, workers: Annotated[int, Field(ge=0, le=1000)] = 0) -> Report:
    """asyncpgプール設定の確認 (§1.5)

    Compares the application's pool (size, overflow, timeout, recycle, SQL log) with the manual's values, and the
    connections that all workers can open with the server's limit. Run it with every release that changes the pool or
    the number of workers, on the application's host.

    It changes nothing; there is nothing to undo. Evidence: each value with its source.

    Departs from the manual: each worker process has its own pool, so size and overflow are multiplied by the workers.

    Args:
        environment: Environment (lab, staging, production …)
        workers: Workers of the backend. 0: found automatically
    """
    env = Environment.find(environment)
    with runbook("Check pool settings", env) as report:
        pool = read_pool(env.application)
        activity = read_activity(env.postgres)
        judge_values(report, env, pool)
        judge_recycle(report, activity.limits, pool)
        judge_total(report, env, activity, pool, workers)
        report.outcome = report.facts.get("connections at most", "the pool's size is unknown")
    return report


def _find_idle(
    activity: SessionActivity, database: str, min_seconds: float, also_idle: bool
) -> tuple[list[ClientSession], str]:
    """This database's sessions that are idle for so long, and the number in other databases."""
    idle = [s for s in activity.clients if s.is_idle_in_transaction or (also_idle and s.is_idle)]
    long = [session for session in idle if session.state_seconds >= min_seconds]
    others = Counter(session.database for session in long if session.database != database)
    elsewhere = ", ".join(f"{count} in {name or 'none'}" for name, count in others.most_common())
    return [session for session in long if session.database == database], elsewhere


def _choose(
    activity: SessionActivity, wanted: list[ClientSession], applications: tuple[str, ...], pools: tuple[str, ...]
) -> tuple[list[ClientSession], list[tuple[ClientSession, str]]]:
    """The sessions to close, in that order, and the kept ones with the reason."""
    blockers = {pid for session in activity.sessions for pid in session.blocked_by}
    judged = [(session, why_kept(session, applications, pools)) for session in wanted]
    chosen = [session for session, why in judged if not why]
    chosen.sort(key=lambda s: (not s.is_idle_in_transaction, s.pid not in blockers, -s.state_seconds))
    return chosen, [(session, why) for session, why in judged if why]


def _report_kept(report: Report, kept: list[tuple[ClientSession, str]]) -> None:
    if kept:
        rows = [(_described(session), why) for session, why in kept]
        report.table("Kept", ("session", "why"), rows, most=MOST_ROWS)
    idle = [session for session, _ in kept if session.is_idle_in_transaction]
    if idle:
        report.warn(
            "idle in transaction and kept",
            f"contact their owners, or end one by hand: SELECT pg_terminate_backend({idle[0].pid})",
            value=f"{len(idle)} sessions",
        )


def _described(session: ClientSession) -> str:
    who = f"{session.user} in {session.database}, {session.application or 'no application name'}, {session.client}"
    return f"{session.pid} ({who}): {session.state} for {duration(session.state_seconds)}: {session.statement[:100]}"


def judge_values(report: Report, env: Environment, pool: Pool) -> None:
    """Compare each value with the manual's."""
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
            report.fail(name, f"correct it in {found.source}", value=found.text, expected="a number")
        else:
            hint = f"set it to {manual} in {found.source} and restart the backend, or document why it differs"
            same = found.number == float(manual)
            report.prefer(name, same, hint, value=found.text, expected=manual)
    report.table("Pool", ("setting", "application", "manual", "read from"), rows)
    _judge_echo(report, env, pool)


def _judge_echo(report: Report, env: Environment, pool: Pool) -> None:
    found = pool.values.get(ECHO)
    if not found or found.is_on is None:
        hint = f"set {ECHO}=false in {env.application.backend_directory}/.env"
        report.warn(f"{ECHO} not measured", hint, value=found.text if found else "not found", expected="False")
        return
    report.require(
        ECHO,
        not found.is_on or env.tier == "development",
        f"set it to false in {found.source} and restart the backend: it logs every statement",
        value=found.text,
        expected="False" if env.tier != "development" else "any, in development",
        worst=Status.CRITICAL if env.tier == "production" else Status.WARN,
    )


def judge_recycle(report: Report, limits: ConnectionLimits, pool: Pool) -> None:
    """Whether the pool renews its sessions before the server ends them as idle."""
    found, limit = pool.values.get(RECYCLE), limits.idle_session_timeout_seconds
    if found and found.number is not None and limit > 0:
        report.prefer(
            "recycle before the server ends idle sessions",
            0 <= found.number < limit,
            f"make {RECYCLE} shorter than idle_session_timeout; otherwise the pool hands out closed connections",
            value=f"{found.text} s",
            expected=f"less than {limit:g} s",
        )


def judge_total(report: Report, env: Environment, activity: SessionActivity, pool: Pool, workers: int) -> None:
    """The connections that all workers can open, against those that the server has for them."""
    count = workers or int((pool.workers.number if pool.workers else None) or 0)
    if not count:
        hint = "run this with workers=…: no running backend was found on this host"
        report.warn("workers not measured", hint, value="1 is assumed", expected="the number of worker processes")
        count = 1
    size, overflow = (pool.values[name].number if name in pool.values else None for name in (SIZE, OVERFLOW))
    if size is None or overflow is None:
        hint = f"set {SIZE} and {OVERFLOW} in the application's configuration"
        report.warn("connections at most: not measured", hint)
    elif size <= 0 or overflow < 0:  # SQLAlchemy's "no limit"
        report.fail("connections at most", f"set {SIZE} above 0 and {OVERFLOW} to 0 or more", value="no limit")
    else:
        total = int((size + overflow) * count)
        shown = f"({size:g} + {overflow:g}) × {count} workers = {total} of {activity.limits.most}"
        report.fact("connections at most", shown)
        _judge_free(report, env, activity, total, shown)


def _judge_free(report: Report, env: Environment, activity: SessionActivity, total: int, shown: str) -> None:
    limits, user = activity.limits, env.postgres.user
    others = sum(session.user != user and not session.superuser for session in activity.clients)
    free = min(limits.application, limits.ordinary - others)
    report.require(
        "connections at most",
        total <= free,
        "shrink the pool, use fewer workers or PgBouncer, or raise max_connections (needs a restart)",
        value=shown,
        expected=f"at most {free}: {limits.most} less {limits.reserved} reserved, {others} used by other roles, "
        "and the limits of role and database",
    )
    alarm = report.limit(metrics.CONNECTIONS)[0]
    if free >= total > limits.most * alarm:
        report.warn("free connections for others", f"shrink the pool: the alarm is at {alarm:.0%}", value=shown)
    used = sum(session.user == user for session in activity.clients)
    report.prefer(
        "the role's connections now",
        used <= total,
        "run this with the right workers=…, or find the other clients that use the application's role",
        value=used,
        expected=f"at most {total}",
    )
