"""Connections to the database and the application's pool (§1.5)."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.database.pool import ALARM_RATIO, judge_recycle, judge_total, judge_values
from runbook.errors import OpsError
from runbook.permit import Act
from runbook.render import duration
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.postgres.blocking import tree_of
from tasks.postgres.connections import CLOSE, Activity, Session, close_sessions, read_activity, why_kept
from tasks.postgres.pool import read_pool

# [warn above, critical above] where the environment's [thresholds] say nothing. The manual's alarm is 80 % (appendix).
DEFAULTS = {
    "postgres.connections.used_ratio": (ALARM_RATIO, 0.95),
    "postgres.sessions.idle_in_transaction_seconds": (60.0, 900.0),
    "postgres.sessions.blocked_seconds": (5.0, 60.0),
}
MANUAL_IDLE_SECONDS = 300
LEAST_SECONDS = 10
MOST_ROWS = 50
CLOSE_FLOW = "close-idle-connections"
WORKING = (
    "look at the first statement of “Who blocks whom”; it ends by itself, or by SELECT pg_cancel_backend(process) "
    "(never while it waits for SyncRep)"
)


@flow(name="check-connections", flow_run_name="check-connections {environment}")
def check_connections(environment: str) -> Report:
    """接続数の確認 (§1.5)

    Counts the sessions of each database, user, application and state against `max_connections`, and shows what is idle,
    what is idle in a transaction, and who blocks whom with what statement. Run it daily, and first when the application
    reports database errors.

    It changes nothing; there is nothing to undo. Evidence: the tables of sessions and the tree of waiting ones.

    Departs from the manual: idle connections are a pool's normal state; what harms is idle *in a transaction*. Counted
    against `max_connections` are clients only: WAL senders and background processes have limits of their own.

    Args:
        environment: 対象の環境 (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check connections", env) as report:
        activity = read_activity(env.postgres)
        _judge_used(report, activity)
        _judge_idle(report, activity)
        _judge_blocked(report, activity)
        if activity.hidden:
            report.warn(
                "not measured",
                f"make {env.postgres.admin_user} a member of pg_read_all_stats, and switch track_activities on",
                value=f"{activity.hidden} sessions hide what they do: the numbers above are too low",
            )
        report.outcome = f"{len(activity.clients) + 1} of {activity.limits.most} connections are in use"
    return report


@flow(name="close-idle-connections", flow_run_name="close-idle-connections {environment}")
def close_idle_connections(
    environment: str,
    min_seconds: Annotated[int, Field(ge=LEAST_SECONDS)] = MANUAL_IDLE_SECONDS,
    also_idle: bool = False,
    keep_applications: tuple[str, ...] = (),
    pool_applications: tuple[str, ...] = ("grc_backend",),
    confirm: str = "",
) -> Report:
    """アイドル接続の切断 (§1.5)

    Ends sessions that have been idle in a transaction for `min_seconds`, those that block others first; with
    `also_idle` also those that are idle outside one. Run it when check-connections finds them. Each is judged again in
    the moment it is ended: one that works again is left alone.

    What a session had not committed is rolled back: it cannot be undone. Evidence: what was closed and what was kept,
    and why.

    Departs from the manual: a pool's own idle connections, replication, superusers, backup programs, sessions with
    advisory locks and those whose last statement is LISTEN are kept (an older LISTEN cannot be seen).

    Args:
        environment: 対象の環境
        min_seconds: この秒数以上アイドルのものだけを対象にする
        also_idle: トランザクション外のアイドル接続も対象にする
        keep_applications: 切断しない application_name の一覧
        pool_applications: 接続プールの application_name。トランザクション外のアイドル接続は切断しない
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Close idle connections", env, confirm, changes=True) as report:
        if min_seconds < LEAST_SECONDS:
            raise OpsError(f"min_seconds is {min_seconds}", f"choose {LEAST_SECONDS} or more: clients pause that long")
        activity = read_activity(env.postgres)
        chosen, kept = _choose(activity, min_seconds, also_idle, keep_applications, pool_applications)
        _tell_kept(report, kept)
        if not chosen:
            report.outcome = "there is nothing to close"
            return report
        for session in chosen:
            report.plan("close session", _described(session))
        permit = report.permit(*(Act(CLOSE, session.target) for session in chosen))
        done = close_sessions(permit, env.postgres, chosen, min_seconds)
        report.table("Closed", ("session", "result"), [(_described(item.session), item.why) for item in done])
        stuck = [item for item in done if not item.closed and item.why.startswith("does not end")]
        if stuck:
            pids = ", ".join(str(item.session.pid) for item in stuck)
            report.warn("sessions that do not end", "launch it again; then look at those processes", value=pids)
        report.outcome = f"{sum(item.closed for item in done)} of {len(done)} sessions closed"
    return report


@flow(name="check-pool-settings", flow_run_name="check-pool-settings {environment}")
def check_pool_settings(environment: str, workers: Annotated[int, Field(ge=0, le=1000)] = 0) -> Report:
    """接続プール設定の確認 (§1.5)

    Compares the application's pool (size, overflow, timeout, recycle, SQL log) with the manual's values, and what all
    its workers may open at once with what the server has places for. Run it with every release that changes the pool
    or the number of workers. It must run on the application's host.

    It changes nothing; there is nothing to undo. Evidence: each value with the place it was read from.

    Departs from the manual: the pool is per worker process, so size and overflow are multiplied by the workers.

    Args:
        environment: 対象の環境
        workers: バックエンドのワーカー数。0 は自動検出
    """
    env = Environment.find(environment)
    with runbook("Check pool settings", env) as report:
        pool = read_pool(env.application)
        activity = read_activity(env.postgres)
        judge_values(report, env, pool)
        judge_recycle(report, activity.limits, pool)
        judge_total(report, env, activity, pool, workers)
        report.outcome = report.facts.get("connections at most", "the pool's size could not be measured")
    return report


def _judge(report: Report, metric: str, value: float, hint: str, of: str) -> Status:
    report.limits = {**DEFAULTS, **report.limits}
    return report.judge(metric, round(value, 3), hint, of=of)


def _judge_used(report: Report, activity: Activity) -> None:
    clients, limits = activity.clients, activity.limits
    hint = "close what is idle in a transaction, lower the pools, or raise max_connections (needs a restart)"
    of = f"{len(clients) + 1} of {limits.most}; {limits.reserved} of them are reserved"
    _judge(report, "postgres.connections.used_ratio", activity.used_ratio, hint, of)
    counted = Counter((s.database, s.user, s.application, s.state or "starting") for s in clients)
    rows = [(*key, count) for key, count in counted.most_common()]
    report.table("Connections", ("database", "user", "application", "state", "count"), rows)
    others = Counter(session.kind or "unknown" for session in activity.sessions if not session.is_client)
    report.fact("other processes", ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "none")


def _judge_idle(report: Report, activity: Activity) -> None:
    held = sorted((s for s in activity.clients if s.is_idle_in_transaction), key=lambda s: -s.state_seconds)
    _judge(
        report,
        "postgres.sessions.idle_in_transaction_seconds",
        max((session.state_seconds for session in held), default=0.0),
        f"correct the code that forgets it; to end it: {CLOSE_FLOW} with min_seconds={MANUAL_IDLE_SECONDS} or less",
        f"{len(held)} sessions" + (f", the longest is process {held[0].pid}" if held else ""),
    )
    idle = sorted((s for s in activity.clients if s.is_idle), key=lambda s: -s.state_seconds)
    long = [session for session in idle if session.state_seconds > MANUAL_IDLE_SECONDS]
    warn_ratio = report.limits["postgres.connections.used_ratio"][0]
    report.expect(
        "idle for more than 5 minutes",
        not long or activity.used_ratio <= warn_ratio,
        f"places are scarce: lower the pools that hold them, or {CLOSE_FLOW} with also_idle",
        value=len(long),
        expected=f"any number while at most {warn_ratio:.0%} of the connections are in use",
        otherwise=Status.WARN,
    )
    _table(report, "Idle in transaction", held)
    _table(report, "Idle for more than 5 minutes", long)


def _judge_blocked(report: Report, activity: Activity) -> None:
    tree = tree_of(activity.sessions)
    waited = max((session.waited_seconds for session in activity.blocked), default=0.0)
    roots = [line for line in tree if line.depth == 0]
    by = ", ".join(f"process {line.pid} ({line.session.state})" for line in roots[:3] if line.session)
    forgotten = any(line.session and line.session.is_idle_in_transaction for line in roots)
    hint = f"{CLOSE_FLOW}: it ends what is idle in a transaction" if forgotten else WORKING
    if any(line.pid == 0 for line in roots):
        hint = "COMMIT PREPARED or ROLLBACK PREPARED what pg_prepared_xacts lists"
    of = f"{len(activity.blocked)} sessions" + (f", by {by}" if by else "")
    _judge(report, "postgres.sessions.blocked_seconds", waited, hint, of)
    rows = [
        ("└ " * line.depth + str(line.pid or "prepared transaction"), *_cells(line.session))
        for line in tree[:MOST_ROWS]
    ]
    if len(tree) > MOST_ROWS:
        rows.append((f"… {len(tree) - MOST_ROWS} more", *[""] * 6))
    if rows:
        columns = ("process", "user", "application", "state", "in this state", "waits", "statement")
        report.table("Who blocks whom", columns, rows)
    if activity.prepared:
        hint = "COMMIT PREPARED or ROLLBACK PREPARED them: they hold locks and hold vacuum back until then"
        report.warn("prepared transactions", hint, value="; ".join(activity.prepared[:5]))


def _cells(session: Session | None) -> tuple[str, ...]:
    if not session:
        return ("", "", "no session holds it", "", "", "")
    waits = duration(session.waited_seconds) if session.blocked_by else ""
    named = (session.user, session.application, session.state or session.kind)
    return (*named, duration(session.state_seconds), waits, session.statement)


def _table(report: Report, name: str, sessions: list[Session]) -> None:
    rows: list[tuple[object, ...]] = [
        (s.pid, s.database, s.user, s.application, s.client, duration(s.state_seconds), s.statement)
        for s in sessions[:MOST_ROWS]
    ]
    if len(sessions) > MOST_ROWS:
        rows.append((f"… {len(sessions) - MOST_ROWS} more", *[""] * 6))
    if rows:
        columns = ("process", "database", "user", "application", "client", "idle for", "last statement")
        report.table(name, columns, rows)


def _choose(
    activity: Activity, min_seconds: float, also_idle: bool, applications: tuple[str, ...], pools: tuple[str, ...]
) -> tuple[list[Session], list[tuple[Session, str]]]:
    """What is to be closed, in that order, and what is idle as long and kept, with the reason."""
    blockers = {pid for session in activity.sessions for pid in session.blocked_by}
    wanted = [s for s in activity.clients if s.is_idle_in_transaction or (also_idle and s.is_idle)]
    judged = [(s, why_kept(s, applications, pools)) for s in wanted if s.state_seconds >= min_seconds]
    chosen = [session for session, why in judged if not why]
    chosen.sort(key=lambda s: (not s.is_idle_in_transaction, s.pid not in blockers, -s.state_seconds))
    return chosen, [(session, why) for session, why in judged if why]


def _tell_kept(report: Report, kept: list[tuple[Session, str]]) -> None:
    if kept:
        report.table("Kept", ("session", "why"), [(_described(session), why) for session, why in kept[:MOST_ROWS]])
    held = [session for session, _ in kept if session.is_idle_in_transaction]
    if held:
        report.warn(
            "idle in transaction and kept",
            f"ask their owners; to end one yourself: SELECT pg_terminate_backend({held[0].pid})",
            value=f"{len(held)} sessions",
        )


def _described(session: Session) -> str:
    who = f"{session.user} in {session.database}, {session.application or 'no application name'}, {session.client}"
    return f"{session.pid} ({who}): {session.state} for {duration(session.state_seconds)}: {session.statement[:100]}"
