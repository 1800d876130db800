"""The record of the timeline in use, written by every run that promotes, swaps or undoes. Called with the report."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from runbook.next import Next
from runbook.report import Report
from tasks.wal.branch import record_in_use


def record_branch(
    report: Report, env: Environment, system: int, timeline: int, left: Sequence[int] = (), *, after: object = None
) -> None:
    """Record the timeline in use beside the archived WAL, where a recovery on another host finds it."""
    if not env.has("wal") or not env.has("backups"):
        return
    if problem := record_in_use.after(after)(env, system, timeline, tuple(left)):
        report.warn(
            "record of the timeline in use",
            "make the archive reachable, then take a base backup: that writes the record too. Until then give a "
            f"recovery timeline={timeline}",
            value=problem,
            follow=[Next("backup-cluster", "take a base backup")],
        )
