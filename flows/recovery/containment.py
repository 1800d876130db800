"""The first minutes of an incident (§8.4): nothing more is lost while people look, and one way back."""

from __future__ import annotations

import argparse
import sys

from prefect import flow

from blocks.environment import Environment
from flows.launch import launch
from flows.recovery import containment_steps as steps
from runbook import containment
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.report import Report
from runbook.run import runbook


@flow(name="contain-incident", flow_run_name="contain-incident {environment}")
def contain_incident(
    environment: str, block_writes: bool = False, reason: str = "", by: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """障害の封じ込め (§8.4)

    Keeps what is there while an incident is looked into: replay is paused on the standbys (they hold what the primary
    held before more of a bug's work arrives), maintenance is frozen (whatever deletes or changes is refused, a run of
    it that goes on is ended), WAL stays where it is. With block_writes the application's roles cannot write any more:
    their transactions are read-only, their sessions end, with what they had not committed. Run it as soon as data seems
    to go wrong, before anybody knows why.

    Backups and recoveries go on. Writes are not held off from superusers, from a client that asks for BEGIN READ WRITE
    by name, or from a prepared transaction that somebody commits. A standby that restarts goes on replaying: launch it
    again then. The longer it lasts, the more WAL piles up on a paused standby.

    Undo: release-containment puts back exactly what this changed. Killed anywhere, launch it again. Evidence: what was
    held still, and at which LSN.

    Departs from the manual: its first response names no way to keep what is there.

    Args:
        environment: 対象の環境
        block_writes: アプリケーションのロールの書き込みも止める
        reason: 理由 (必須)。拒否されたメンテナンスの表示に出る
        by: 実施者の名前 (必須)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Contain incident", env, confirm, plan, changes=True, rank="recovery") as report:
        if not reason.strip() or not by.strip():
            raise OpsError("who contains it, and why, is not said", "fill in by and reason: refused runs show them")
        scene = steps.survey(report, env, block_writes=block_writes)
        known = containment.read(env.name, env.reports_directory)
        report.pin_state("contained", known.id if known else "no")
        permit = report.permit(*steps.plan_containment(report, env, scene))
        contained = steps.noted(env, known, scene, reason.strip(), by.strip())
        report.state_is("maintenance is frozen; not all is held still yet", "launch it again, or release-containment")
        steps.hold_still(report, permit, env, scene)
        steps.conclude(report, contained, scene)
    return report


@flow(name="release-containment", flow_run_name="release-containment {environment}")
def release_containment(environment: str, plan: str = "", confirm: str = "") -> Report:
    """封じ込めの解除 (§8.4)

    Puts back what contain-incident changed, and nothing else: replay goes on where that had paused it, roles get the
    setting back that they had (their sessions end once more, since what began meanwhile stays read-only), maintenance
    may run again. Run it when the incident is over, or when a failover needs the standby.

    What cannot be put back now (a server is down) keeps the environment contained: launch it again then. Undo:
    contain-incident. Evidence: each thing, as it was and as it is.

    Departs from the manual: it knows no containment.

    Args:
        environment: 対象の環境
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Release containment", env, confirm, plan, changes=True, rank="recovery") as report:
        found = containment.read(env.name, env.reports_directory)
        if found is None:
            report.outcome = "it is not contained: there is nothing to release"
            return report
        report.pin_state("contained", found.id)
        permit = report.permit(*steps.plan_release(report, found))
        steps.release(report, permit, env, found)
    return report


def main() -> int:
    """`python -m flows.recovery.containment contain|release --environment NAME …`: also where Prefect died."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.containment")
    commands = parser.add_subparsers(dest="command", required=True)
    contain, release = commands.add_parser("contain"), commands.add_parser("release")
    for command in (contain, release):
        command.add_argument("--environment", required=True)
        command.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")
    contain.add_argument("--block-writes", action="store_true")
    contain.add_argument("--reason", default="")
    contain.add_argument("--by", default="")
    given = vars(parser.parse_args())
    return launch(contain_incident if given.pop("command") == "contain" else release_containment, given)


if __name__ == "__main__":
    sys.exit(exit_code(main))
