"""The replication of the database in a diagnosis: the standby, commits that wait, lag, the WAL archive, the slots."""

from __future__ import annotations

from flows.database.server.replication import lag_of
from flows.troubleshooting.database_sessions import LOCKS
from flows.troubleshooting.diagnosis import Cause, Diagnosis, Impact, start_hint
from runbook import metrics
from runbook.errors import OpsError
from runbook.next import Next
from runbook.report import Status
from runbook.units import duration, size
from tasks.postgres.replication.replay import RUNNING, read_replaying
from tasks.postgres.replication.status import Replication, read_replication
from tasks.postgres.server.greeting import read_greeting

CHECK = Next("check-replication", "see which standby lags, and which slot retains WAL")
REJOIN = Next("rejoin-standby", "make it follow the primary again")
PROMOTE = Next("postgres-failover", "promote it")
OPTIONS = Next("show-recovery-options", "compare the recovery options and their data loss")
WAITED_SECONDS = 10.0
STANDBY, COMMITS, LAG = "standby", "commits", "lag"


def has_one_primary(found: Diagnosis) -> bool:
    """Whether at most one server takes writes. If two do, no other answer counts: each has its own data."""
    if not found.env.has("standby"):
        return True
    question = "does only one server take writes?"
    try:
        found.record(question, f"{found.env.postgres.host}:{found.env.postgres.port} is the primary")
    except OpsError as error:
        follow = (Next("rejoin-standby", "when one of them is stopped: make it a standby"), OPTIONS)
        found.record(question, error.message, Cause(error.message, error.hint, follow, impact=Impact.HIDES))
        return False
    return True


def judge_standby(found: Diagnosis) -> None:
    """Whether the standby answers: a stopped one has no lag that could be measured."""
    if not found.env.has("standby"):
        return
    node = found.env.standby
    greeting, cause = read_greeting(node), None
    if greeting.state != "ready":
        cause = Cause(
            f"the standby at {node.host}:{node.port} does not answer ({greeting.state}: {greeting.detail})",
            f"{start_hint(found, node.service)}; until then a failover is impossible, and its slot retains WAL",
            (CHECK, REJOIN),
            Status.WARN,
            STANDBY,
            Impact.THREATENS,
            explains=(COMMITS, LAG),
        )
    found.record(f"does the other node at {node.host}:{node.port} answer?", greeting.detail, cause)


def judge_replication(found: Diagnosis) -> None:
    """Commits that wait, lag, archiving and slots."""
    replication = found.ask("does WAL reach the standby and the archive?", lambda: read_replication(found.env.postgres))
    if not replication:
        return
    if replication.settings.in_recovery:
        what = "PostgreSQL is in recovery: it is a standby and rejects writes"
        cause = Cause(what, "promote it only if the primary is proven lost", (PROMOTE, OPTIONS))
        found.record("is it a primary?", "it is in recovery", cause)
        return
    _judge_waiting(found, replication)
    _judge_lag(found, replication)
    archiver = replication.archiver
    if archiver.is_failing:
        seen = f"{archiver.waiting} files wait, the last failure was {archiver.last_failed}"
        hint = "fix archive_command; the server's log shows its error"
        what = f"archiving of WAL fails, and pg_wal grows: {seen}"
        cause = Cause(what, hint, (CHECK,), Status.WARN, impact=Impact.THREATENS)
        found.record("is WAL archived?", seen, cause)
    if lost := ", ".join(one.name for one in replication.slots if one.wal_status == "lost"):
        hint = "make a new base backup for their standby"
        found.record(
            "do the slots have their WAL?",
            lost,
            Cause(f"replication slots are lost: {lost}", hint, (REJOIN, CHECK), Status.WARN, impact=Impact.THREATENS),
        )


def _judge_waiting(found: Diagnosis, replication: Replication) -> None:
    count = replication.waiting_commits
    seen, cause = "1 commit waits" if count == 1 else f"{count} commits wait", None
    if replication.waiting_commits and replication.waited_seconds > WAITED_SECONDS:
        seen = f"{seen}, the longest for {duration(replication.waited_seconds)}"
        hint = "start the standby or the WAL receiver; never cancel a waiting commit"
        what = f"{seen}, for the standby that synchronous_standby_names requires"
        cause = Cause(what, hint, (CHECK,), kind=COMMITS, explains=(LOCKS,))
    found.record("do commits wait for a standby?", seen, cause)


def _judge_lag(found: Diagnosis, replication: Replication) -> None:
    limit = found.report.limit(metrics.REPLICATION_LAG)[0]
    lags = [(one, lag_of(one)) for one in replication.standbys]
    lagging = [f"{one.name} by {duration(lag)}" for one, lag in lags if lag > limit]
    seen, cause = f"{len(replication.standbys)} are connected", None
    hint = "check the standby's host, and long queries on it"
    if paused := _find_paused(found, replication):
        lagging = [paused]
        hint = (
            "resume it if no incident needs the old data: release-containment, or SELECT pg_wal_replay_resume() there"
        )
    if lagging:
        seen = ", ".join(lagging)
        cause = Cause(f"replication lags: {seen}", hint, (CHECK,), Status.WARN, LAG, Impact.THREATENS)
    found.record("does a standby lag?", seen, cause)


def _find_paused(found: Diagnosis, replication: Replication) -> str:
    """The standby whose replay is paused while WAL waits for it. The primary measures no lag of it: it reports the last
    WAL that was replayed."""
    behind = max((one.replay_bytes or 0 for one in replication.standbys), default=0)
    if not behind or not found.env.has("standby"):
        return ""
    (node,) = read_replaying([found.env.standby])
    return f"{node.address} by {size(behind)}, its replay is {node.state}" if node.state not in ("", RUNNING) else ""
