"""A disk is full: what holds the space, and what may go at once (appendix A).

It also runs without a Prefect server, which a full disk may have stopped:

    python -m flows.troubleshooting.disk --environment production
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.deleting import judge_clocks
from flows.launch import launch
from flows.pinned import pin_deleted
from flows.troubleshooting.disk_acts import Removal, carry_out, find_removals
from flows.troubleshooting.disk_holders import find_holders, tell_holders
from flows.troubleshooting.disk_systems import FileSystem, judge_systems, read_systems
from runbook.drivers import exit_code
from runbook.guard.alone import OPTION, RISK
from runbook.page.render import markdown
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import size


@flow(name="free-disk-emergency", flow_run_name="free-disk-emergency {environment}")
def free_disk_emergency(
    environment: str,
    log_days: Annotated[int, Field(ge=1, le=3650)] = 7,
    scratch_hours: Annotated[int, Field(ge=1, le=720)] = 1,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """ディスク逼迫時の緊急対応 (付録A, 付録B)

    Shows what holds the space of the file systems that are over 85 %, the biggest first, each with its bytes and what
    to do: replication slots and a failing archiver that keep WAL, temporary files, databases and directories that
    restores kept, logs, backups, Docker. Then it removes, in this order and only there: scratch directories of runs
    that are dead, backups that were begun and never ended, rotated logs older than `log_days` that nobody has open. Run
    it when the disk alarm comes, or when PostgreSQL stopped with “No space left on device”.

    It never touches pg_wal: a file removed there is a database lost. Slots, kept databases, whole backups and Docker's
    images are decisions: it tells them with the form of the runbook for each. It needs no room of its own. What it
    removes cannot be undone; with an empty confirm it shows every path with its bytes. Evidence: that list, and the
    free bytes before and after.

    Not in the manual but for appendix B's row (ディスク使用率 >85 %: クリーンアップ).

    Args:
        environment: 対象の環境
        log_days: 最後の書き込みからこの日数を過ぎたローテーション済みログを削除する
        scratch_hours: 最後の書き込みからこの時間を過ぎた、実行中でない一時ディレクトリを削除する
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Free disk emergency", env, confirm, plan, changes=True) as report:
        systems = read_systems(report, env)
        judge_systems(report, systems, otherwise=Status.WARN)
        full = [one for one in systems if one.is_over(report)]
        tell_holders(report, env, find_holders(report, env, systems), systems)
        if not full:
            report.outcome = "no file system of this environment is over its limit"
            return report
        judge_clocks(report, env)
        before = datetime.now(UTC) - timedelta(days=log_days)
        removals = find_removals(report, env, {one.device for one in full}, before, scratch_hours * 3600)
        if not removals:
            report.fail(
                "something that may go",
                "decide on what “What holds the space” names, in its order",
                value="nothing is left that may be removed without a decision",
            )
            report.fail_if_critical()
        for one in removals:
            report.plan(one.act.kind, one.detail, size=one.bytes)
        pin_deleted(report, "files", ((one.act, one.bytes) for one in removals))
        permit = report.permit(*(one.act for one in removals))
        gone = carry_out(report, permit, removals, before, scratch_hours * 3600)
        _tell_after(report, env, full, gone, removals)
    return report


def _tell_after(
    report: Report, env: Environment, full: list[FileSystem], gone: list[Removal], wanted: list[Removal]
) -> None:
    """What is free now, by the file systems' own count."""
    now = {one.device: one for one in read_systems(report, env)}
    again = [now[one.device] for one in full if one.device in now]
    freed = sum(now[one.device].disk.free_bytes - one.disk.free_bytes for one in full if one.device in now)
    judge_systems(report, again, otherwise=Status.CRITICAL, when="afterwards")
    report.table("Removed", ("what", "which", "bytes"), [(one.act.kind, one.detail, size(one.bytes)) for one in gone])
    report.outcome = f"{len(gone)} of {len(wanted)} removed, {size(max(freed, 0))} more are free"


def main() -> int:
    """The command line."""
    what = "ディスク逼迫時の緊急対応 (付録A)"
    parser = argparse.ArgumentParser(prog="python -m flows.troubleshooting.disk", description=what)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--log-days", type=int, default=7)
    parser.add_argument("--scratch-hours", type=int, default=1)
    parser.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")
    parser.add_argument(OPTION, action="store_true", help=f"where none answers: {RISK}")
    given = vars(parser.parse_args())
    without = given.pop("without_prefect")
    return launch(free_disk_emergency, given, markdown, without_prefect=without)


if __name__ == "__main__":
    sys.exit(exit_code(main))
