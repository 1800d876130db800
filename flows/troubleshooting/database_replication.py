"""The replication of the database in a diagnosis: the standby, commits that wait, lag, the WAL archive, the slots."""

from __future__ import annotations

from flows.troubleshooting.database_sessions import LOCKS
from flows.troubleshooting.diagnosis import Cause, Diagnosis, Impact, start_hint
from runbook import metrics
from runbook.next import Next
from runbook.report import Status
from runbook.units import duration
from tasks.postgres.replication.status import Replication, read_replication
from tasks.postgres.server.greeting import read_greeting

CHECK = Next("check-replication", "see which standby lags, and which slot retains WAL")
REJOIN = Next("rejoin-standby", "make it follow the primary again")
PROMOTE = Next("postgres-failover", "promote it")
OPTIONS = Next("show-recovery-options", "compare the recovery options and their data loss")
WAITED_SECONDS = 10.0
STANDBY, COMMITS, LAG = "standby", "commits", "lag"


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
    seen, cause = f"{count} {'commit waits' if count == 1 else 'commits wait'}", None
    if replication.waiting_commits and replication.waited_seconds > WAITED_SECONDS:
        seen += f", the longest for {duration(replication.waited_seconds)}"
        hint = "start the standby or the WAL receiver; never cancel a waiting commit"
        what = f"{seen}, for the standby that synchronous_standby_names requires"
        cause = Cause(what, hint, (CHECK,), kind=COMMITS, explains=(LOCKS,))
    found.record("do commits wait for a standby?", seen, cause)


def _judge_lag(found: Diagnosis, replication: Replication) -> None:
    limit = found.report.limit(metrics.REPLICATION_LAG)[0]
    lagging = [one for one in replication.standbys if one.lag_seconds > limit]
    seen, cause = f"{len(replication.standbys)} are connected", None
    if lagging:
        seen = ", ".join(f"{one.name} by {duration(one.lag_seconds)}" for one in lagging)
        hint = "check the standby's host, and long queries on it"
        cause = Cause(f"replication lags: {seen}", hint, (CHECK,), Status.WARN, LAG, Impact.THREATENS)
    found.record("does a standby lag?", seen, cause)
