"""The second half of the database's tree: what the server itself says."""

from __future__ import annotations

from collections import Counter

from flows.database.session_findings import judge_blocked, judge_idle, judge_used
from flows.troubleshooting.database_outside import FREE_DISK, OPTIONS, full_cause
from flows.troubleshooting.diagnosis import Cause, Diagnosis, Next, worst_of
from runbook.render import duration
from runbook.report import Status
from tasks.postgres.blocking import tree_of
from tasks.postgres.connections import Activity, read_activity
from tasks.postgres.greeting import read_greeting
from tasks.postgres.replication import Replication, read_replication
from tasks.postgres.trial import try_to_extend

CLOSE = Next("close-idle-connections", "end what sits idle in a transaction", {"min_seconds": 60})
CHECK = Next("check-connections", "see who blocks whom, and who has the places")
REPLICATION = Next("check-replication", "see who lags, and what holds WAL")
LAG_SECONDS = 10.0  # the manual's alarm (appendix B)
WAITED_SECONDS = 10.0


def walk_inside(found: Diagnosis) -> None:
    """Each of these is judged, whatever the one before found."""
    _judge_writing(found)
    node = found.env.postgres
    activity = found.ask("who is connected?", lambda: read_activity(node))
    if activity:
        if activity.hidden:
            found.skip("what does every session do?", f"{activity.hidden} sessions hide it",
                       f"make {node.admin_user} a member of pg_read_all_stats")  # fmt: skip
        _judge_places(found, activity)
        _judge_locks(found, activity)
        _judge_idle(found, activity)
    _judge_standby(found)
    replication = found.ask("does WAL get away?", lambda: read_replication(node))
    if replication:
        _judge_replication(found, replication)


def _judge_writing(found: Diagnosis) -> None:
    question = "can it write?"
    # Where the application's role is not let in, whether the server can write is asked all the same.
    trial = found.ask(question, lambda: try_to_extend(found.env.postgres, as_application=not found.causes))
    if trial:
        if trial.ok:
            found.well(question, "a temporary table, rolled back")
        elif trial.kind == "disk":
            found.blame(question, trial.said, Cause(f"the disk of PostgreSQL is full: {trial.said}",
                        "make room, never by hand in pg_wal", (FREE_DISK,)))  # fmt: skip
        elif trial.kind == "read only":
            ways = (Next("postgres-failover", "promote it, if the primary is lost"), OPTIONS)
            found.blame(question, trial.said, Cause(f"the database takes no writes: {trial.said}",
                        "it is a standby, or somebody contained it (release-containment)", ways))  # fmt: skip
        else:
            found.blame(question, trial.said, Cause(f"PostgreSQL refuses a write: {trial.said}",
                        "correct that; its log tells more"))  # fmt: skip


def _judge_places(found: Diagnosis, activity: Activity) -> None:
    question, limits = "are there places left?", activity.limits
    status = worst_of(found.report, lambda: judge_used(found.report, activity), "postgres.connections.used_ratio")
    told = f"{len(activity.clients) + 1} of {limits.most}, {limits.reserved} of them reserved"
    counted = Counter((one.user, one.application or "no name") for one in activity.clients).most_common(1)
    by = f", {counted[0][1]} by {counted[0][0][0]} ({counted[0][0][1]})" if counted else ""
    node = found.env.postgres
    own = sum(one.user == node.user for one in activity.clients)
    inside = sum(one.database == node.database for one in activity.clients)
    narrow = (("role", node.user, own, limits.of_role), ("database", node.database, inside, limits.of_database))
    limited = [(kind, name, most) for kind, name, there, most in narrow if 0 <= most <= there]
    if limited:
        kind, name, most = limited[0]
        found.blame(question, told, Cause(
            f"the {kind} {name} has reached its own connection limit of {most}: max_connections does not matter",
            f"ALTER {kind.upper()} {name} CONNECTION LIMIT raises it; close-idle-connections ends idle sessions",
            (CLOSE, CHECK),
        ))  # fmt: skip
        return
    full = len(activity.clients) >= limits.ordinary or own >= limits.application
    if full or (status is not Status.OK and activity.used_ratio >= 0.95):
        found.blame(question, told, full_cause(found, f"{node.host}:{node.port}", f" ({told}{by})", limits.most))
    elif status is not Status.OK:
        found.blame(question, told, Cause(f"PostgreSQL is near its connection limit: {told}{by}",
                    "lower the pools, or raise max_connections", (CLOSE, CHECK), Status.WARN))  # fmt: skip
    else:
        found.well(question, told)


def _judge_locks(found: Diagnosis, activity: Activity) -> None:
    question = "does anybody wait for a lock?"
    database = found.env.postgres.database
    status = worst_of(
        found.report, lambda: judge_blocked(found.report, activity, database), "postgres.sessions.blocked"
    )
    tree = tree_of(activity.sessions)
    if not tree or status is Status.OK:
        found.well(question, f"{len(activity.blocked)} sessions wait")
        return
    root = tree[0]
    who = "a prepared transaction"
    if root.session:
        who = f"process {root.pid} ({root.session.user}, {root.session.application or 'no name'}, {root.session.state})"
    waited = max(one.waited_seconds for one in activity.blocked)
    told = f"{len(activity.blocked)} sessions wait, the longest for {duration(waited)}, behind {who}"
    idle = root.session is not None and root.session.is_idle_in_transaction
    doing = "" if root.session is None else f"; its statement: {root.session.statement[:120]}"
    found.blame(question, told, Cause(f"a lock pile-up: {told}{doing}",
                "end it by close-idle-connections, its client forgot it" if idle else
                "the table “Who blocks whom” begins with who holds them up; pg_cancel_backend ends its statement",
                (CLOSE, CHECK) if idle else (CHECK,), status))  # fmt: skip


def _judge_idle(found: Diagnosis, activity: Activity) -> None:
    question, database = "does anybody sit idle in a transaction?", found.env.postgres.database
    metric = "postgres.sessions.idle_in_transaction"
    status = worst_of(found.report, lambda: judge_idle(found.report, activity, database), metric)
    idle = [one for one in activity.clients if one.is_idle_in_transaction]
    many = len(idle) > max(5, len(activity.clients) / 2)
    told = f"{len(idle)} of {len(activity.clients)} sessions"
    if idle and (many or status is not Status.OK):
        longest = max(one.state_seconds for one in idle)
        found.blame(question, told, Cause(
            f"{told} sit idle in a transaction, the longest for {duration(longest)}: they hold places, locks and rows",
            "the code forgets to end its transactions; close them, and set idle_in_transaction_session_timeout",
            (CLOSE, CHECK), status if status is not Status.OK else Status.WARN,
        ))  # fmt: skip
    else:
        found.well(question, told)


def _judge_standby(found: Diagnosis) -> None:
    """A dead standby does not lag: it is not there."""
    if not found.env.has("standby"):
        return
    node = found.env.standby
    question, greeting = f"does the other node at {node.host}:{node.port} answer?", read_greeting(node)
    if greeting.state == "ready":
        found.well(question, greeting.detail)
        return
    found.blame(question, greeting.detail, Cause(
        f"the standby at {node.host}:{node.port} does not answer ({greeting.state}: {greeting.detail})",
        "start it, or look at its log; until then nothing takes over, and a slot keeps WAL for it",
        (REPLICATION, Next("rejoin-standby", "make it follow again")), Status.WARN,
    ))  # fmt: skip


def _judge_replication(found: Diagnosis, replication: Replication) -> None:
    if replication.settings.in_recovery:
        found.blame("is it a primary?", "it is in recovery", Cause(
            "PostgreSQL is in recovery: it is a standby, and takes no writes",
            "promote it only when the primary is proven lost", (Next("postgres-failover", "promote it"), OPTIONS),
        ))  # fmt: skip
        return
    question = "do commits wait for a standby?"
    if replication.waiting_commits and replication.waited_seconds > WAITED_SECONDS:
        told = f"{replication.waiting_commits} commits wait, the longest for {duration(replication.waited_seconds)}"
        found.blame(question, told, Cause(f"{told}, for the standby that synchronous_standby_names asks for",
                    "bring the standby or the receiver back; never cancel what waits", (REPLICATION,)))  # fmt: skip
    else:
        found.well(question, f"{replication.waiting_commits} commits wait")
    lagging = [one for one in replication.standbys if one.lag_seconds > LAG_SECONDS]
    if lagging:
        told = ", ".join(f"{one.name} by {duration(one.lag_seconds)}" for one in lagging)
        found.blame("does a standby lag?", told, Cause(f"replication lags: {told}",
                    "look at the standby's host, and at long queries there", (REPLICATION,), Status.WARN))  # fmt: skip
    else:
        found.well("does a standby lag?", f"{len(replication.standbys)} are connected")
    archiver = replication.archiver
    if archiver.is_failing:
        told = f"{archiver.waiting} files wait, the last failure was {archiver.last_failed}"
        found.blame("is WAL archived?", told, Cause(f"archiving of WAL fails, and pg_wal grows: {told}",
                    "the server's log says why archive_command fails", (REPLICATION,), Status.WARN))  # fmt: skip
    lost = [one.name for one in replication.slots if one.wal_status == "lost"]
    if lost:
        found.blame("are the slots whole?", ", ".join(lost), Cause(f"replication slots are lost: {', '.join(lost)}",
                    "their standby needs a new base backup", (REPLICATION,), Status.WARN))  # fmt: skip
