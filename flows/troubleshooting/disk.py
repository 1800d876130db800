"""A disk is full: what uses the space, and what can be deleted at once (appendix A).

It also runs without a Prefect server, which a full disk may have stopped:

    python -m flows.troubleshooting.disk --environment production
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.deleting import judge_clocks
from flows.launch import add_confirmation, launch
from flows.pinned import pin_deleted
from flows.troubleshooting.disk_removals import carry_out, find_removals
from flows.troubleshooting.disk_usage import attach_usage, find_usage
from flows.troubleshooting.file_systems import FileSystem, judge_systems, read_systems
from runbook.change import carrying_out
from runbook.drivers import exit_code
from runbook.flow import flow
from runbook.guard.alone import OPTION, RISK
from runbook.guard.effect import Effect
from runbook.page.render import markdown
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, size


@flow(name="free-disk-emergency", flow_run_name=RunName("free-disk-emergency {environment}"))
def free_disk_emergency(
    environment: str,
    log_days: Annotated[int, Field(ge=1, le=3650)] = 7,
    scratch_hours: Annotated[int, Field(ge=1, le=720)] = 1,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """ディスク逼迫時の緊急対応 (付録A, 付録B)

    Shows what uses the space of the file systems over 85 %, largest first, with bytes and the next step: WAL retained
    by replication slots or a failing archiver, temporary files, databases and directories that restores kept, logs,
    backups, Docker. Then it deletes, on those file systems only and in this order:

    1. scratch directories of dead runs;
    2. incomplete backups of this environment;
    3. rotated logs older than `log_days` that no process has open.

    Run it when the disk alarm fires, or when PostgreSQL stopped with “No space left on device”. It needs no free disk
    space itself.

    It never touches pg_wal: deleting a file there destroys the database. Replication slots, kept databases, complete
    backups and Docker images need a decision: the report links the runbook for each. Deleted files cannot be restored;
    with an empty confirm it lists every path with its bytes. Evidence: that list, and the free bytes before and after.

    Not in the manual, apart from appendix B's row (disk usage above 85 %: clean up).

    Args:
        environment: Environment (lab, staging, production …)
        log_days: Delete rotated logs that were last written more than this many days ago
        scratch_hours: Delete scratch directories that no run uses and that were last written more than this many hours
            ago
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Free disk emergency", env, confirm, plan, changes=True) as report:
        systems = read_systems(report, env)
        judge_systems(report, systems)
        full = [one for one in systems if one.is_over(report)]
        attach_usage(report, env, find_usage(report, env, systems))
        if not full:
            report.outcome = "no file system of this environment is over its limit"
            return report
        judge_clocks(report, env)
        before = datetime.now(UTC) - timedelta(days=log_days)
        removals = find_removals(report, env, {one.device for one in full}, before, scratch_hours * 3600)
        if not removals:
            report.fail(
                "files that can be deleted",
                "decide about the largest row of “What uses the space”",
                value="none without a decision",
            )
            report.fail_if_critical()
        freed = size(sum(one.size for one in removals))
        lost = "old log lines and unfinished backups are lost"
        effect = Effect(
            f"deletes {counted(len(removals), 'file or directory', 'files and directories')} (about {freed})", "", lost
        )
        pins = [lambda report: pin_deleted(report, "files", ((one.acts[0], one.size) for one in removals))]
        with carrying_out(report, *removals, effect=effect, pins=pins) as carry:
            removed = carry_out(report, carry, removals)
        _judge_after(report, env, full)
        rows = [(one.step, one.detail, size(one.size)) for one in removed]
        report.table("Removed", ("what", "which", "bytes"), rows)
        report.outcome = f"{len(removed)} of {len(removals)} removed, {report.outcome}"
    return report


def _judge_after(report: Report, env: Environment, full: list[FileSystem]) -> None:
    """Measure the file systems again: still over the critical limit is CRITICAL now."""
    now = {one.device: one for one in read_systems(report, env)}
    freed = sum(now[one.device].disk.free_bytes - one.disk.free_bytes for one in full if one.device in now)
    judge_systems(report, [now[one.device] for one in full if one.device in now], afterwards=True)
    report.outcome = f"{size(max(freed, 0))} more are free"


def main() -> int:
    """The command line."""
    what = "free disk space in an emergency (appendix A)"
    parser = argparse.ArgumentParser(prog="python -m flows.troubleshooting.disk", description=what)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--log-days", type=int, default=7)
    parser.add_argument("--scratch-hours", type=int, default=1)
    add_confirmation(parser)
    parser.add_argument(OPTION, action="store_true", help=f"where none answers: {RISK}")
    given = vars(parser.parse_args())
    without = given.pop("without_prefect")
    return launch(free_disk_emergency, given, markdown, without_prefect=without)


if __name__ == "__main__":
    sys.exit(exit_code(main))
