"""The whole cluster, or some of its tables, as it was at a point in time (§8.2)."""

from __future__ import annotations

import argparse
import sys
from typing import Annotated, Literal, get_args

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database.cluster_verification import judge_space, judge_version
from flows.database.table_steps import require_names
from flows.database.tables import restore_tables
from flows.database.wal_reading import mend
from flows.launch import launch
from flows.pinned import pin_database
from flows.recovery import point_build, point_choice, point_swap, point_tables, point_target
from flows.recovery.point_choice import Origin
from flows.recovery.point_target import Found
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.permit import Permit
from runbook.report import Report
from runbook.run import runbook
from tasks.cluster.instance import (
    Instance,
    prepare_instance,
    put_away,
    root_for,
    running,
    sweep_instance,
)
from tasks.cluster.recovery import wait_recovered
from tasks.cluster.target import By, Stop, parse_target

Mode = Literal["swap", "tables"]


@flow(name="restore-to-point", flow_run_name="restore-to-point {environment} {by} {target} {mode}")
def restore_to_point(
    environment: str,
    by: By = "time",
    target: str = "",
    mode: Mode = "swap",
    tables: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    backup: str = "auto",
    timeline: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    source: Stores = "backups",
    plan: str = "",
    confirm: str = "",
) -> Report:
    """任意の時点への復旧 (§8.2)

    Brings the whole PostgreSQL cluster, or chosen tables, to a point in time: from the newest base backup before it and
    the archived WAL. Run it when data was destroyed by a bug or a person, and the moment is known: find-transaction
    finds the transaction.

    The copy is built in a directory of its own beside the live one, on its own port, unable to reach anything. WAL says
    which transaction is the last before the target and which the first after it; the paused copy must have the one and
    not the other, before anything live is stopped. Then the copy takes the live directory's place (mode=swap: services
    stop for seconds, the old directory is kept), or restore-tables brings the rows of chosen tables back (mode=tables:
    nothing stops, what others wrote since stays). A target outside of the archive, and WAL that is missing, damaged or
    another cluster's, is refused, with the newest and oldest point that can be reached.

    After a swap: a new timeline, so take a base backup (backup-cluster) and build the standby anew (rejoin-standby).
    Undo: the old data directory is beside. Evidence: both sides of the target, rows in the copy and live.

    Departs from the manual: it knows the last night's dump only, and drops the live database first.

    Args:
        environment: 対象の環境
        by: target の種類。time 日時、before_transaction トランザクション直前、transaction 直後、lsn LSN、latest 最新
        target: 復旧する時点 (latest 以外では必須)。日時 (ゾーンなしは環境の時間帯)、トランザクション番号、または LSN
        mode: swap クラスタ全体を入れ替え、tables 指定テーブルの行だけを戻す
        tables: mode が tables のときは必須。テーブル名 (スキーマ.テーブル)
        backup: auto、またはベースバックアップ名 (base_YYYYMMDD_HHMMSS)
        timeline: たどるタイムライン。0 はアーカイブの最新
        source: 保管先。copies は複製先
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Restore to point", env, confirm, plan, changes=True, rank="recovery") as report:
        point_target.require_target(target, by)
        wanted = parse_target(by, target, env.zone)
        _require_mode(mode, tables)
        root = root_for(env.postgres)
        if sweep_instance(root):
            report.fact("removed", f"{root}, which an earlier run left")
        point_choice.ship(report, env, source)
        origin = point_choice.choose_origin(report, env, wanted, backup, timeline, source)
        report.pin("backup", origin.backup.name)
        report.pin("timeline", origin.chain.timeline.number)
        judge_version(report, env, origin.backup)
        judge_space(report, env, origin.whole, len(origin.chain.links) * origin.content.segment_bytes)
        report.fail_if_critical()
        instance = prepare_instance(env.postgres, root)
        report.at_end(lambda: put_away(instance))
        found = point_target.find_in_wal(env, origin, wanted, root / "wal")
        mend(report, origin.archive, found.replaced, found.undecodable, root / "wal")
        stop = point_target.judge_target(report, origin, wanted, found)
        _plan(report, env, origin, found, mode, tables)
        acts = point_swap.acts(env) if mode == "swap" else point_tables.acts(tables)
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(*acts)
        report.state_is("nothing live was touched", "launch it again when what is said above is put right")
        point_choice.bring_files(report, origin)
        point_build.build(env, instance, origin, found.links, root / "wal")
        if mode == "swap":
            _swap(report, permit, env, origin, instance, stop)
        else:
            _copy_back(report, env, origin, instance, stop, tables)
    return report


def _require_mode(mode: Mode, tables: list[str]) -> None:
    if mode == "tables":
        require_names(tables)
    elif tables:
        raise OpsError("tables are named, and the whole cluster is to be swapped", "choose mode=tables, or name none")


def _plan(report: Report, env: Environment, origin: Origin, found: Found, mode: Mode, tables: list[str]) -> None:
    content, wal = origin.content, len(found.links) * origin.content.segment_bytes
    root = root_for(env.postgres)
    report.plan("build the copy", f"{origin.backup.name} in {root}", size=content.bytes, seconds=content.bytes / 150e6)
    report.plan("replay", f"{len(found.links)} segments of WAL", size=wal, seconds=wal / 60e6)
    report.plan("prove", "the last transaction before the target is there, the first after it is not")
    if mode == "swap":
        point_swap.plan(report, env)
    else:
        point_tables.plan(report, tables)


def _swap(
    report: Report, permit: Permit, env: Environment, origin: Origin, instance: Instance, stop: Stop
) -> None:  # fmt: skip
    with running(instance, stop, origin.chain.timeline.number):
        wait_recovered(instance, origin.content.system)
        point_build.prove(report, env, instance, origin, stop)
        timeline = point_swap.promote(env, instance)
    with point_swap.services_held(report, env) as held:
        point_swap.swap(report, permit, env, instance, held, timeline)
        point_swap.start(report, permit, env, held)
    point_swap.tell_after(report, env, origin, held, timeline)
    wal = len(origin.chain.links) * origin.content.segment_bytes
    report.measure("database point in time", origin.content.bytes + wal)
    report.outcome = "the cluster stands at the target, proven on both sides"


def _copy_back(
    report: Report, env: Environment, origin: Origin, instance: Instance, stop: Stop, tables: list[str]
) -> None:
    with running(instance, stop, origin.chain.timeline.number):
        wait_recovered(instance, origin.content.system)
        point_build.prove(report, env, instance, origin, stop)
        at = stop.before.at if stop.before else origin.content.stopped
        kept = point_tables.keep(report, env, instance, tables, at)
    done = restore_tables.fn(env.name, tables=tables, backup=kept.name, confirm=env.name)
    report.table("What restore-tables did", ("what", "value"), list(done.facts.items()))
    report.state_is(f"the rows of {', '.join(tables)} were replaced", "undo-restore-tables goes back")
    report.outcome = f"{', '.join(tables)} hold what they held at the target ({done.outcome})"


def main() -> int:
    """`python -m flows.recovery.point_in_time --environment NAME --by … --target …`: also where Prefect died."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.point_in_time")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--by", choices=get_args(By), default="time")
    parser.add_argument("--target", default="")
    parser.add_argument("--mode", choices=get_args(Mode), default="swap")
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--backup", default=point_choice.AUTO)
    parser.add_argument("--timeline", type=int, default=0)
    parser.add_argument("--source", choices=get_args(Stores), default="backups")
    parser.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")
    return launch(restore_to_point, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
