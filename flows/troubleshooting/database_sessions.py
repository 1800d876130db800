"""The sessions of the database in a diagnosis: connections left, lock waits, sessions idle in a transaction."""

from __future__ import annotations

from collections import Counter

from flows.database.server.sessions import judge_blocked, judge_idle, judge_used
from flows.troubleshooting.diagnosis import Cause, Diagnosis, Impact, status_of
from runbook import metrics
from runbook.next import Next
from runbook.report import Status
from runbook.units import duration
from tasks.postgres.sessions.blocking import Waiting, tree_of
from tasks.postgres.sessions.closing import why_kept
from tasks.postgres.sessions.connections import SessionActivity, read_activity

MANUAL_CONNECTIONS, REMEDY_HOURS = 300, 24
LIMIT, LOCKS, IDLE = "connection limit", "locks", "idle in transaction"
LEAST_IDLE_SECONDS, USUAL_IDLE_SECONDS = 10, 60
CHECK = Next("check-connections", "see which sessions block others, and which clients use the connections")
POOLS = Next("check-pool-settings", "compare the pools with the connection limit")


def close_idle(seconds: float = USUAL_IDLE_SECONDS) -> Next:
    """End sessions that are idle in a transaction: also those that have been so for these seconds only."""
    least = max(LEAST_IDLE_SECONDS, min(USUAL_IDLE_SECONDS, int(seconds)))
    return Next("close-idle-connections", "end sessions that are idle in a transaction", {"min_seconds": least})


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


def full_cause(where: str, seen: str = "", most: int = 0, *, idle_seconds: float = -1, is_blind: bool = False) -> Cause:
    """The connection limit is reached. `most`: the server's max_connections, if known. `idle_seconds`: of the longest
    session that is idle in a transaction; -1: unknown. `is_blind`: not even the administrator can log in. The remedy is
    that of 付録A."""
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
    first = "end sessions that are idle in a transaction; then lower"
    if is_blind:
        first = (
            "stop one of the application's processes: that frees connections, also for the administrator; then lower"
        )
    elif not idle_seconds:
        first = "no session is idle in a transaction: lower"
    close = close_idle(idle_seconds) if idle_seconds > 0 else close_idle()
    return Cause(
        f"PostgreSQL at {where} has reached its connection limit{seen}: it refuses new clients",
        f"{first} the pools, or raise max_connections (needs a restart)",
        (
            *((close, CHECK) if idle_seconds else (CHECK,)),
            POOLS,
            Next("apply-postgres-settings", "temporary remedy: raise the limit (appendix A)", more, reminder),
            Next("undo-postgres-settings", "afterwards: restore the old limit"),
        ),
        kind=LIMIT,
        impact=Impact.HIDES if is_blind else Impact.HURTS,
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
        cause = Cause(what, hint, (close_idle(), CHECK), kind=LIMIT)
    elif len(activity.clients) >= limits.ordinary or own >= limits.application or status is Status.CRITICAL:
        longest = max((one.state_seconds for one in activity.clients if one.is_idle_in_transaction), default=0.0)
        cause = full_cause(f"{node.host}:{node.port}", f" ({used}{by})", limits.most, idle_seconds=longest)
    elif status is not Status.OK:
        what = f"PostgreSQL is near its connection limit: {used}{by}"
        hint = "lower the pools, or raise max_connections"
        cause = Cause(what, hint, (CHECK, POOLS), Status.WARN, impact=Impact.THREATENS)
    found.record("are connections left?", used, cause)


def _judge_locks(found: Diagnosis, activity: SessionActivity) -> None:
    question, database = "does a session wait for a lock?", found.env.postgres.database
    status = status_of(found.report, lambda: judge_blocked(found.report, activity, database), metrics.BLOCKED)
    tree = tree_of(activity.sessions)
    if not tree or status is Status.OK:
        found.record(question, f"{len(activity.blocked)} sessions wait")
        return
    root = tree[0]
    waited = max(one.waited_seconds for one in activity.blocked)
    count = len(activity.blocked)
    waits = "1 session waits" if count == 1 else f"{count} sessions wait, the longest"
    seen = f"{waits} for {duration(waited)}, behind {_described(root)}"
    hint, follow = _unblock(root, activity, database)
    statement = f"; its statement: {root.session.statement[:120]}" if root.session else ""
    explains = (LIMIT,) if _fills(count, activity) else ()
    cause = Cause(f"a lock pile-up: {seen}{statement}", hint, follow, status, LOCKS, explains=explains)
    found.record(question, seen, cause)


def _fills(count: int, activity: SessionActivity) -> bool:
    """Whether so many sessions are what uses the connections: at least half of them."""
    return count * 2 >= len(activity.clients)


def _described(root: Waiting) -> str:
    if not root.session:
        return "a prepared transaction"
    session = root.session
    return f"process {root.pid} ({session.user}, {session.application or 'no name'}, {session.state or session.kind})"


def _unblock(root: Waiting, activity: SessionActivity, database: str) -> tuple[str, tuple[Next, ...]]:
    """What ends the blocker: the runbook if it may end this session, otherwise the statement."""
    session = root.session
    if not session:
        named = "; ".join(activity.prepared[:3]) or "see pg_prepared_xacts"
        return f"COMMIT PREPARED or ROLLBACK PREPARED the transaction that holds the lock ({named})", (CHECK,)
    if session.waits_for_standby:
        return "start the standby or the WAL receiver; never cancel a commit that waits for one", (CHECK,)
    if not session.is_idle_in_transaction:
        end = "cancel the blocking statement, if it may be repeated"
        return f"{end}: SELECT pg_cancel_backend({root.pid})", (CHECK,)
    left = "its client left the transaction open"
    kept = f"of database {session.database}" if session.database != database else why_kept(session, (), ())
    if kept:
        end = f"end it by hand, as close-idle-connections keeps it ({kept})"
        return f"{left}; {end}: SELECT pg_terminate_backend({root.pid})", (CHECK,)
    return f"end the blocking session: {left}", (close_idle(session.state_seconds), CHECK)


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
            (close_idle(longest), CHECK),
            Status.WARN if status is Status.OK else status,
            IDLE,
            Impact.THREATENS,
            explains=(LIMIT,) if _fills(len(idle), activity) else (),
        )
    found.record("are sessions idle in a transaction?", seen, cause)
