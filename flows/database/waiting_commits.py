"""Commits that would wait forever for a missing standby, called with the open report of a restore."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from runbook.change import Carrier, Change, State
from runbook.errors import Unreachable
from runbook.guard.permit import Act, PlannedStep
from runbook.report import Report
from runbook.wait import until
from tasks.postgres.replication.synchronous import ALONE, Synchrony, address, commit_alone, read_synchrony, synchrony

# A standby or WAL receiver reconnects within 5 s of the primary's start; on a busy host it takes longer.
ATTACH_SECONDS = 30.0


def reattaching(env: Environment) -> str:
    """The next step where the standby and the WAL receiver do not follow the server any more."""
    if env.has("standby"):
        return (
            "run rejoin-standby to reattach the standby and the WAL receiver; commits wait for them again afterwards. "
            "Until then a failure of this server loses every write since the newest backup"
        )
    return (
        f"move {env.wal.directory} aside and start the WAL receiver, then run backup-cluster, and ALTER SYSTEM RESET "
        "synchronous_standby_names if it was overridden. Until then a failure of this server loses every write since "
        "the newest backup"
        if env.has("wal")
        else "start its standby, then ALTER SYSTEM RESET synchronous_standby_names"
    )


def alone_act(env: Environment) -> Act:
    """The act to permit: continue without the standbys that commits wait for."""
    return Act(ALONE, address(env.postgres))


def plan_commits(report: Report, env: Environment, begun: State) -> Sequence[Change[[], Synchrony]]:
    """Judge whether a commit on the running server would return, and plan to continue without a standby. It is skipped
    where commits return. No line if commits wait for no standby."""
    if not _judge(report, env).needed:
        return ()
    return [plan_override(env, begun)]


def plan_override(env: Environment, begun: State | None = None) -> Change[[], Synchrony]:
    """Plan to continue without a standby, also for a server that does not run yet. `let_commits_return` carries it
    out."""
    step = _step()
    return Change(commit_alone.bind(env.postgres), step.step, step.detail, begun=begun, is_optional=True)


def let_commits_return(
    report: Report, env: Environment, carry: Carrier, planned: Change[[], Synchrony], *, new: bool = False
) -> None:
    """Override synchronous_standby_names where commits would hang, and report how to reattach the standbys. They get
    `ATTACH_SECONDS` to reconnect; none follows a `new` cluster."""
    found = read_synchrony(env.postgres)
    if not found.needed or not (new or found.hangs) or (not new and _attached(env)):
        carry.skip(planned, "enough standbys are connected")
        return
    carry(planned)
    _report_override(report, env, found)


def _step() -> PlannedStep:
    return PlannedStep(
        "continue without a standby",
        f"if none connects within {ATTACH_SECONDS:.0f} s: commits then wait for no standby",
    )


def _judge(report: Report, env: Environment) -> Synchrony:
    found = read_synchrony(env.postgres)
    if found.hangs:
        report.warn(
            "commits wait forever",
            "start the standby or the WAL receiver, or this run continues without them",
            value=f"{len(found.connected)} standbys connected",
            expected=f"{found.needed}, by synchronous_standby_names ({found.names})",
        )
    return found


def _report_override(report: Report, env: Environment, found: Synchrony) -> None:
    report.warn(
        "commits wait for no standby",
        reattaching(env),
        value="synchronous_standby_names was overridden: no standby is connected",
        expected=found.names,
    )


def _attached(env: Environment) -> bool:
    try:
        return until(
            lambda: not synchrony(env.postgres).hangs, what="their return", seconds=ATTACH_SECONDS, every_seconds=0.5
        )
    except Unreachable:
        return False
