"""Sessions of the database: connections in use, idle ones, blocked ones (§1.5). Called with the open report."""

from __future__ import annotations

from collections import Counter

from runbook import metrics
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration
from tasks.postgres.sessions.blocking import tree_of
from tasks.postgres.sessions.closing import why_kept
from tasks.postgres.sessions.connections import ClientSession, SessionActivity

MANUAL_IDLE_SECONDS = 300
MOST_ROWS = 50
CLOSE_FLOW = "close-idle-connections"
WORKING = (
    "wait for the first statement of “Who blocks whom”, or end it by SELECT pg_cancel_backend(process); never while it "
    "waits for SyncRep"
)


def judge_used(report: Report, activity: SessionActivity) -> None:
    """The connections in use against max_connections, by client."""
    clients, limits = activity.clients, activity.limits
    hint = "close sessions idle in a transaction, shrink the pools, or raise max_connections (needs a restart)"
    of = f"{len(clients) + 1} of {limits.most}; {limits.reserved} of them are reserved"
    follow = [Next(CLOSE_FLOW, "end idle sessions"), Next("check-pool-settings", "compare the pools with the limit")]
    report.judge(metrics.CONNECTIONS, activity.used_ratio, hint, of=of, follow=follow)
    counted = Counter((s.database, s.user, s.application, s.state or "starting") for s in clients)
    rows = [(*key, count) for key, count in counted.most_common()]
    report.table("Connections", ("database", "user", "application", "state", "count"), rows)
    others = Counter(session.kind or "unknown" for session in activity.sessions if not session.is_client)
    report.fact("other processes", ", ".join(f"{count} {kind}" for kind, count in sorted(others.items())) or "none")


def judge_idle(report: Report, activity: SessionActivity, database: str) -> None:
    """Idle sessions: in a transaction they hold locks and rows, outside one they only use connections."""
    idle = sorted((s for s in activity.clients if s.is_idle_in_transaction), key=lambda s: -s.state_seconds)
    ours, others = [s for s in idle if s.database == database], [s for s in idle if s.database != database]
    report.judge(
        metrics.IDLE,
        max((session.state_seconds for session in ours), default=0.0),
        f"run {CLOSE_FLOW} (a lower min_seconds for younger ones), and fix the code that leaves them open",
        of=f"{len(ours)} sessions" + (f", the longest is process {ours[0].pid}" if ours else ""),
        follow=[Next(CLOSE_FLOW, "end them", {"min_seconds": MANUAL_IDLE_SECONDS})],
    )
    limit = report.limit(metrics.IDLE)[0]
    if others and others[0].state_seconds > limit:
        counted = Counter(session.database for session in others)
        report.warn(
            "idle in transaction in other databases",
            f"run {CLOSE_FLOW} in the environment of each: here it ends sessions of {database} only",
            value=", ".join(f"{count} in {name}" for name, count in counted.most_common(5)),
            expected=f"≤ {duration(limit)}",
        )
    long = [session for session in activity.clients if session.is_idle and session.state_seconds > MANUAL_IDLE_SECONDS]
    long.sort(key=lambda session: -session.state_seconds)
    warn_ratio = report.limit(metrics.CONNECTIONS)[0]
    report.prefer(
        "idle for more than 5 minutes",
        not long or activity.used_ratio <= warn_ratio,
        f"free connections: shrink the pools that open them, or run {CLOSE_FLOW} with also_idle (of {database} only)",
        value=len(long),
        expected=f"any number while at most {warn_ratio:.0%} of the connections are in use",
        follow=[Next(CLOSE_FLOW, "end them", {"also_idle": True})],
    )
    _show_sessions(report, "Idle in transaction", [*ours, *others])
    _show_sessions(report, "Idle for more than 5 minutes", long)


def judge_blocked(report: Report, activity: SessionActivity, database: str) -> None:
    """Who waits for whom, and for how long."""
    tree = tree_of(activity.sessions)
    waited = max((session.waited_seconds for session in activity.blocked), default=0.0)
    roots = [line for line in tree if line.depth == 0]
    by = ", ".join(f"process {line.pid} ({line.session.state})" for line in roots[:3] if line.session)
    left = [line.session for line in roots if line.session and line.session.is_idle_in_transaction]
    forgotten = any(one.database == database and not why_kept(one, (), ()) for one in left)
    hint = f"run {CLOSE_FLOW}, which ends sessions idle in a transaction" if forgotten else WORKING
    if any(line.pid == 0 for line in roots):
        hint = "COMMIT PREPARED or ROLLBACK PREPARED the transactions in pg_prepared_xacts"
    of = f"{len(activity.blocked)} sessions" + (f", by {by}" if by else "")
    report.judge(metrics.BLOCKED, waited, hint, of=of, follow=[Next(CLOSE_FLOW, "end the blocker")] * forgotten)
    rows = [("└ " * line.depth + str(line.pid or "prepared transaction"), *_cells(line.session)) for line in tree]
    if rows:
        columns = ("process", "user", "application", "state", "in this state", "waits", "statement")
        report.table("Who blocks whom", columns, rows, most=MOST_ROWS)
    if activity.prepared:
        hint = "COMMIT PREPARED or ROLLBACK PREPARED them: until then they hold locks and hold vacuum back"
        report.warn("prepared transactions", hint, value="; ".join(activity.prepared[:5]))


def _cells(session: ClientSession | None) -> tuple[str, ...]:
    if not session:
        return ("", "", "no session", "", "", "")
    waits = duration(session.waited_seconds) if session.blocked_by else ""
    named = (session.user, session.application, session.state or session.kind)
    return (*named, duration(session.state_seconds), waits, session.statement)


def _show_sessions(report: Report, name: str, sessions: list[ClientSession]) -> None:
    rows = [
        (s.pid, s.database, s.user, s.application, s.client, duration(s.state_seconds), s.statement) for s in sessions
    ]
    if rows:
        columns = ("process", "database", "user", "application", "client", "idle for", "last statement")
        report.table(name, columns, rows, most=MOST_ROWS)
