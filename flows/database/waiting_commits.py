"""Commits that would wait for ever for a standby that is away, called with the open report of a restore."""

from __future__ import annotations

from blocks.environment import Environment
from runbook.errors import Unreachable
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.wait import until
from tasks.postgres.replication.synchronous import ALONE, address, commit_alone, read_synchrony, synchrony

# A standby, or a receiver of WAL, comes back by itself within 5 s of the primary's start, on a busy host later.
ATTACH_SECONDS = 30.0
LEFT_BEHIND = (
    "rejoin-standby joins the standby and the receiver of WAL again, and commits wait for them then. Until then a "
    "failure of this server loses every write since the newest backup"
)


def alone_act(env: Environment) -> Act:
    """What a restore needs a permit for on a server whose commits wait for others."""
    return Act(ALONE, address(env.postgres))


def judge_commits(report: Report, env: Environment) -> None:
    """On a running server: whether what a restore writes would ever be committed."""
    found = read_synchrony(env.postgres)
    if found.hangs:
        what = (
            f"{len(found.connected)} of {found.needed} connected that synchronous_standby_names ({found.names}) needs"
        )
        report.warn(
            "commits wait for ever", "start the standby or the receiver of WAL; else this run goes on alone", value=what
        )
        report.plan(
            "go on without a standby", f"if none connects within {ATTACH_SECONDS:.0f} s: commits wait for nobody"
        )


def free_commits(report: Report, permit: Permit, env: Environment, *, after: object, new: bool = False) -> None:
    """Where nobody is there for whom commits wait, they wait for nobody, and the report says what to do about it. A
    `new` cluster is followed by nobody; else those who follow get `ATTACH_SECONDS` to come back."""
    found = read_synchrony.after(after)(env.postgres)
    if not found.needed or not (new or found.hangs) or (not new and _attached(env)):
        return
    commit_alone.after(found)(permit, env.postgres)
    report.warn(
        "commits wait for no standby",
        LEFT_BEHIND,
        value="synchronous_standby_names was overridden: none of them is connected",
        expected=found.names,
    )


def _attached(env: Environment) -> bool:
    try:
        return until(
            lambda: not synchrony(env.postgres).hangs, what="their return", seconds=ATTACH_SECONDS, every_seconds=0.5
        )
    except Unreachable:
        return False
