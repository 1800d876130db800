"""The sessions of the database in a diagnosis: connections left, lock waits, sessions idle in a transaction."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from flows.database.server.sessions import judge_blocked, judge_idle, judge_used
from flows.troubleshooting.diagnosis import Cause, Diagnosis, status_of
from runbook import metrics
from runbook.next import Next
from runbook.report import Status
from runbook.units import duration
from tasks.postgres.sessions.blocking import tree_of
from tasks.postgres.sessions.connections import SessionActivity, read_activity

MANUAL_CONNECTIONS, REMEDY_HOURS = 300, 24
LIMIT = "connection limit"
CLOSE = Next("close-idle-connections", "end sessions that are idle in a transaction", {"min_seconds": 60})
CHECK = Next("check-connections", "see which sessions block others, and which clients use the connections")


def judge_sessions(found: Diagnosis) -> None:
    """Judge every question about the sessions, whatever the others found."""
    node = found.env.postgres
    activity = found.ask("which sessions are connected?", lambda: read_activity(node))
    if not activity:
        return
    if activity.hidden:
        found.skip(
            "what does every session do?",
            f"{activity.hidden} sessions are hidden from {node.admin_user}",
            f"make {node.admin_user} a member of pg_read_all_stats",
        )
    _judge_connections(found, activity)
    _judge_locks(found, activity)
    _judge_idle(found, activity)


def full_cause(where: str, seen: str = "", most: int = 0) -> Cause:
    """The connection limit is reached. `most`: the server's max_connections, if known. The remedy is that of 付録A."""
    raised = max(MANUAL_CONNECTIONS, -(-most * 3 // 2))
    more = {
        "override": f"max_connections = {raised}",
        "override_hours": REMEDY_HOURS,
        "reason": "connection limit reached (diagnose-database)",
    }
    reminder = (
        "takes effect at a restart of PostgreSQL only, on a standby first; a reload does not apply it. "
        f"It expires after {REMEDY_HOURS} h: undo it then, and restart again"
    )
    return Cause(
        f"PostgreSQL at {where} has reached its connection limit{seen}: it refuses new clients",
        "end sessions that are idle in a transaction; then lower the pools, or raise max_connections (needs a restart)",
        (
            CLOSE,
            CHECK,
            Next("check-pool-settings", "compare the pools with the connection limit"),
            Next("apply-postgres-settings", "temporary remedy: raise the limit (付録A)", more, reminder),
            Next("undo-postgres-settings", "afterwards: restore the old limit"),
        ),
        kind=LIMIT,
    )


def _judge_connections(found: Diagnosis, activity: SessionActivity) -> None:
    node, limits = found.env.postgres, activity.limits
    status = status_of(found.report, lambda: judge_used(found.report, activity), metrics.CONNECTIONS)
    used = f"{len(activity.clients) + 1} of {limits.most}, {limits.reserved} of them reserved"
    counted = Counter((one.user, one.application or "no name") for one in activity.clients).most_common(1)
    by = f", {counted[0][1]} by {counted[0][0][0]} ({counted[0][0][1]})" if counted else ""
    own = sum(one.user == node.user for one in activity.clients)
    inside = sum(one.database == node.database for one in activity.clients)
    narrow = (("role", node.user, own, limits.of_role), ("database", node.database, inside, limits.of_database))
    reached = [(kind, name, most) for kind, name, count, most in narrow if 0 <= most <= count]
    cause = None
    if reached:
        kind, name, most = reached[0]
        what = f"the {kind} {name} has reached its own connection limit of {most}: max_connections does not matter"
        hint = f"raise it with ALTER {kind.upper()} {name} CONNECTION LIMIT, or end idle sessions"
        cause = Cause(what, hint, (CLOSE, CHECK))
    elif len(activity.clients) >= limits.ordinary or own >= limits.application or status is Status.CRITICAL:
        cause = full_cause(f"{node.host}:{node.port}", f" ({used}{by})", limits.most)
    elif status is not Status.OK:
        what = f"PostgreSQL is near its connection limit: {used}{by}"
        cause = Cause(what, "lower the pools, or raise max_connections", (CLOSE, CHECK), Status.WARN)
    found.record("are connections left?", used, cause)


def _judge_locks(found: Diagnosis, activity: SessionActivity) -> None:
    question, database = "does a session wait for a lock?", found.env.postgres.database
    status = status_of(found.report, lambda: judge_blocked(found.report, activity, database), metrics.BLOCKED)
    tree = tree_of(activity.sessions)
    if not tree or status is Status.OK:
        found.record(question, f"{len(activity.blocked)} sessions wait")
        return
    root, blocker, statement = tree[0], "a prepared transaction", ""
    if root.session:
        session = root.session
        blocker = f"process {root.pid} ({session.user}, {session.application or 'no name'}, {session.state})"
        statement = f"; its statement: {session.statement[:120]}"
    waited = max(one.waited_seconds for one in activity.blocked)
    seen = f"{len(activity.blocked)} sessions wait, the longest for {duration(waited)}, behind {blocker}"
    if root.session and root.session.is_idle_in_transaction:
        cause = Cause("", "end the blocking session: its client left the transaction open", (CLOSE, CHECK), status)
    else:
        cause = Cause("", "cancel the first statement of “Who blocks whom” with pg_cancel_backend", (CHECK,), status)
    found.record(question, seen, replace(cause, what=f"a lock pile-up: {seen}{statement}"))


def _judge_idle(found: Diagnosis, activity: SessionActivity) -> None:
    database = found.env.postgres.database
    status = status_of(found.report, lambda: judge_idle(found.report, activity, database), metrics.IDLE)
    idle = [one for one in activity.clients if one.is_idle_in_transaction]
    many = len(idle) > max(5, len(activity.clients) / 2)
    seen, cause = f"{len(idle)} of {len(activity.clients)} sessions", None
    if idle and (many or status is not Status.OK):
        longest = max(one.state_seconds for one in idle)
        cause = Cause(
            f"{seen} are idle in a transaction, the longest for {duration(longest)}; they hold locks",
            "end them, fix the code that leaves transactions open, and set idle_in_transaction_session_timeout",
            (CLOSE, CHECK),
            Status.WARN if status is Status.OK else status,
        )
    found.record("are sessions idle in a transaction?", seen, cause)
