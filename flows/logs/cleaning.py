"""Old rotated logs removed (§6.2, §7.3)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.deleting import judge_clocks, limit_unattended
from flows.logs.findings import Log, path_of
from flows.pinned import pin_deleted
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, size
from tasks.logs.reading.files import LogFile, find_logs
from tasks.logs.rotation.cleaning import REMOVE, Holders, read_holders, remove_log

MANUAL_DAYS = 30


@flow(name="clean-logs", flow_run_name=RunName("clean-logs {environment} {logs}"))
def clean_logs(
    environment: str,
    days: Annotated[int, Field(ge=1)] = MANUAL_DAYS,
    logs: tuple[Log, ...] = ("app",),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """ログローテーション: 古いログの削除 (§6.2)

    Deletes rotated files of the application's log that were last written more than `days` ago; rotated files of the
    audit log only if `logs` names it. Run it when the disk of the logs fills up, or weekly. logrotate deletes by number
    (rotate 30); this runbook deletes the files that logrotate has left.

    It never deletes the log itself, or a file that a process has open: the process would lose what it writes. While the
    environment is contained, nothing is deleted. It cannot be undone; the plan shows each file with its age and size.

    Args:
        environment: Environment (lab, staging, production …)
        days: Delete files that were last written more than this many days ago
        logs: Logs. The audit log only if it is chosen
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Clean logs", env, confirm, plan, changes=True) as report:
        if not logs:
            raise OpsError("no log is named", "choose app, audit or both in logs")
        judge_clocks(report, env)
        before, number = datetime.now(UTC) - timedelta(days=days), 0
        chosen = list[LogFile]()
        for log in dict.fromkeys(logs):
            path = Path(path_of(env, log))
            files = find_logs(path)
            old = [file for file in files if file.path != path and file.modified < before]
            number += len(files)
            chosen += _not_open(report, old, read_holders(old))
            report.fact(log, f"{size(sum(file.bytes for file in files))} in {len(files)} files, {len(old)} of them old")
        oldest_first = sorted(chosen, key=lambda file: file.modified)
        chosen = list(limit_unattended(report, env, "log files", oldest_first, number))
        if not chosen:
            report.outcome = f"no rotated file is older than {days} days"
            return report
        removing = {file.path: _removal(report, file, before) for file in chosen}
        freed = size(sum(file.bytes for file in chosen))
        effect = Effect(
            f"deletes {counted(len(chosen), 'rotated log')} older than {days} days ({freed})",
            "",
            "their lines are lost",
        )
        pinned = [(f"{file.path} {file.inode}", file.bytes) for file in chosen]
        pins = [lambda report: pin_deleted(report, "rotated logs", pinned)]
        with carrying_out(report, *removing.values(), effect=effect, pins=pins) as carry:
            deleted = [file for file in chosen if carry(removing[file.path])]
        left = [file.path.name for file in chosen if file not in deleted]
        if left:
            report.warn(
                "files that were not deleted",
                "run it again: they were rotated or opened meanwhile",
                value=", ".join(left[:5]),
            )
        report.outcome = f"{len(deleted)} files deleted, {size(sum(file.bytes for file in deleted))}"
    return report


def _removal(report: Report, file: LogFile, before: datetime) -> Change[[], bool]:
    age = (report.started - file.modified).days
    what = f"{file.path}, last written {age} days ago"
    return Change(remove_log.bind(file, before), REMOVE, what, size=file.bytes)


def _not_open(report: Report, old: Sequence[LogFile], holders: Holders) -> list[LogFile]:
    """The files that no process has open."""
    held = [(file.path.name, holders.by_inode[file.inode]) for file in old if file.inode in holders.by_inode]
    if held:
        report.warn(
            "rotated files that are still open",
            "restart the process, or make it reopen its log",
            value="; ".join(f"{name}: {who}" for name, who in held[:5]),
        )
    if old and not holders.whole:
        report.warn(
            "processes checked for open files",
            "run the worker as root, or as the application's user",
            value="not all: this user cannot see the open files of other users",
        )
    return [file for file in old if file.inode not in holders.by_inode]
