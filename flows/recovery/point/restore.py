"""Point-in-time recovery of the whole cluster, or of chosen tables (§8.2)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database.base_backup import judge_space, judge_version
from flows.database.live_tables import judge_live
from flows.database.tables import require_names
from flows.database.wal_reading import mend
from flows.launch import add_confirmation, launch
from flows.pinned import pin_database
from flows.recovery import unlogged
from flows.recovery.gate import ClusterCopy, planned_loss
from flows.recovery.point import build, choice
from flows.recovery.point import target as point_target
from flows.recovery.point.cluster import ClusterReplacement
from flows.recovery.point.tables import TablesRestore
from flows.recovery.point.target import FoundTarget
from runbook import clock
from runbook.change import carrying_out
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, NoUndo
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.cluster.instance import prepare_instance, put_away, root_for, sweep_instance
from tasks.cluster.target import By, parse_target

Mode = Literal["swap", "tables"]


@flow(name="restore-to-point", flow_run_name=RunName("restore-to-point {environment} {by} {target} {mode}"))
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

    Restores the whole PostgreSQL cluster, or chosen tables, to a point in time, from a base backup and the archived
    WAL. Run it when a bug or a person destroyed data and the time is known; find-transaction finds the transaction.

    It builds an isolated copy in a separate directory, on a separate port. The WAL shows the last transaction before
    the target and the first one after it. The paused copy must have the first of the two and not the second; only then
    does the run touch live data. With mode=swap the copy replaces the live directory: services stop for seconds, and
    the old directory is kept. With mode=tables restore-tables replaces the rows of the chosen tables: nothing stops,
    and newer rows of other tables stay. It refuses unlogged tables: a recovered copy has none of their rows.

    It refuses a target outside the archive, and WAL that is missing, damaged or from another cluster. The report then
    has the oldest and the newest reachable point.

    A swap starts a new timeline: take a base backup (backup-cluster) and rebuild the standby (rejoin-standby). Undo:
    undo-full-restore, which puts the kept data directory back. Evidence: the transactions on both sides of the target,
    rows in the copy and live.

    Departs from the manual, which only has the last night's dump and drops the live database first.

    Args:
        environment: Environment (lab, staging, production …)
        by: Kind of target: time, before_transaction (just before it), transaction (just after it), lsn, latest
        target: Point to recover to (required except for latest): a time (e.g. 2026-02-15 03:00 or 2026-02-15
            03:00+09:00; without a zone: the environment's), a transaction ID or an LSN
        mode: swap: replace the whole cluster; tables: put back only the rows of tables
        tables: Required for mode=tables: names of tables (schema.table)
        backup: auto, or the name of a base backup (base_YYYYMMDD_HHMMSS)
        timeline: Timeline to follow. 0: the one in use
        source: Store. copies: the replica store
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook(
        "Restore to point", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery"
    ) as report:
        point_target.require_target(target, by)
        wanted = parse_target(by, target, env.zone)
        _require_mode(mode, tables)
        root = root_for(env.postgres)
        if sweep_instance(root):
            report.fact("deleted", f"{root}, left by an earlier run")
        acknowledged = choice.ship(report, env, source)
        origin = choice.choose_origin(report, env, wanted, backup, timeline, source, acknowledged=acknowledged)
        report.pin("backup", origin.backup.name)
        report.pin("timeline", origin.chain.timeline.number)

        def pin(report: Report) -> None:
            pin_database(report, env.postgres, replaced=True)

        judge_version(report, env, origin.backup)
        judge_space(report, env, origin.whole, len(origin.chain.links) * origin.content.segment_bytes)
        report.fail_if_critical()
        instance = prepare_instance(env.postgres, root)
        report.at_end(lambda: put_away(instance))
        found = point_target.find_in_wal(env, origin, wanted, root / "wal")
        mend(report, origin.archive, found.replaced, found.undecodable, root / "wal")
        stop = point_target.judge_target(report, origin, wanted, found)
        point_target.judge_database(report, env, origin, stop, found, root / "wal")
        copy = ClusterCopy(env.postgres.database, origin, stop, found.commits)
        build.judge_tablespaces(report, env, origin, stop, root / "wal", "swap" if mode == "swap" else "dump")
        if mode == "swap":
            replacement = ClusterReplacement.plan(report, env, instance, copy, found, wanted, source)
            effect = _effect(env, copy, found, by, replacement.seconds_down)
            with carrying_out(report, *replacement.lines, effect=effect, pins=[pin]) as carry:
                replacement.carry_out(carry)
        else:
            judge_live(report, env, tables)
            report.fact("columns", "compared in the copy: if they changed since the target, the run replaces nothing")
            unlogged.judge_named(report, env, tables)
            restore = TablesRestore.plan(report, env, instance, copy, found, tables)
            effect = _effect_on_tables(copy, by, tables)
            with carrying_out(report, *restore.lines, effect=effect, pins=[pin, restore.pin]) as carry:
                restore.carry_out(carry)
    return report


def _require_mode(mode: Mode, tables: list[str]) -> None:
    if mode == "tables":
        require_names(tables)
    elif tables:
        raise OpsError("tables are given, but mode=swap replaces the whole cluster", "choose mode=tables, or give none")


def _effect(env: Environment, copy: ClusterCopy, found: FoundTarget, by: By, down: float) -> Effect:
    since = _since(copy)
    lost = Loss.everything_since(copy.part, since)
    if by == "latest" or not found.more:
        lost = planned_loss(env, copy, found.lost, to_the_end=by == "latest")
    is_there = Path(env.postgres.data_directory).is_dir()
    undo = "undo-full-restore" if is_there else NoUndo("the data directory is missing, so nothing is kept")
    return Effect(f"all databases of the cluster go back to {_when(copy)}", undo, (lost,), down)


def _effect_on_tables(copy: ClusterCopy, by: By, tables: Sequence[str]) -> Effect:
    what = first_of(tables)
    lost = Loss.everything_since(what, _since(copy))
    if by == "latest" and copy.origin.unread:
        lost = Loss.not_known(what, copy.origin.unread)
    locked = "the tables are locked for the swap"
    return Effect(f"{what}: rows go back to {_when(copy)}", "undo-restore-tables", (lost,), locked)


def _when(copy: ClusterCopy) -> str:
    before = copy.stop.before
    return f"{clock.short(before.at)}" if before else "the end of the base backup"


def _since(copy: ClusterCopy) -> datetime:
    return copy.stop.before.at if copy.stop.before else copy.origin.content.stopped


def main() -> int:
    """The command line: it runs through Prefect if that answers, otherwise without it."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.point.restore")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--by", choices=get_args(By), default="time")
    parser.add_argument("--target", default="")
    parser.add_argument("--mode", choices=get_args(Mode), default="swap")
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--backup", default=choice.AUTO)
    parser.add_argument("--timeline", type=int, default=0)
    parser.add_argument("--source", choices=get_args(Stores), default="backups")
    add_confirmation(parser)
    return launch(restore_to_point, vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
