"""Point-in-time recovery of the whole cluster, or of chosen tables (§8.2)."""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database.base_backup import judge_space, judge_version
from flows.database.live_tables import judge_live
from flows.database.tables import require_names, restore_tables
from flows.database.wal_reading import mend
from flows.launch import add_confirmation, launch
from flows.pinned import pin_database
from flows.recovery import unlogged
from flows.recovery.gate import ClusterCopy, fence_cluster, planned_loss
from flows.recovery.point import build, choice, server_state, swap
from flows.recovery.point import target as point_target
from flows.recovery.point.target import FoundTarget
from flows.recovery.stopped_services import read_cluster_services, started_on_failure
from flows.store import store_for
from runbook import clock
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, NoUndo, seconds_from
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, CarriesOut, Permit
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import first_of
from tasks.application.health import wait_healthy
from tasks.backups import publishing
from tasks.backups.catalogue import Backup
from tasks.backups.manifest import Manifest, sums_of
from tasks.cluster.instance import PrivateInstance, prepare_instance, put_away, root_for, running, sweep_instance
from tasks.cluster.recovery import promote_instance, read_standing, wait_recovered
from tasks.cluster.swap import sync_cluster
from tasks.cluster.target import By, RecoveryTarget, parse_target
from tasks.host.services import start_services
from tasks.postgres.dump.dump import What, dump_database, dump_globals
from tasks.postgres.restore.planner_statistics import analyze
from tasks.postgres.tables.chosen import choose_tables
from tasks.postgres.tables.filenodes import read_database_names
from tasks.wal.format.names import lsn_text

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
        judge_version(report, env, origin.backup)
        judge_space(report, env, origin.whole, len(origin.chain.links) * origin.content.segment_bytes)
        report.fail_if_critical()
        instance = prepare_instance(env.postgres, root)
        report.at_end(lambda: put_away(instance))
        found = point_target.find_in_wal(env, origin, wanted, root / "wal")
        mend(report, origin.archive, found.replaced, found.undecodable, root / "wal")
        stop = point_target.judge_target(report, origin, wanted, found)
        copy = ClusterCopy(env.postgres.database, origin, stop, found.commits)
        _plan(report, env, copy, found, by, mode, tables)
        if mode == "swap":
            unlogged.warn_emptied(report, env, stores=source)
        else:
            judge_live(report, env, tables)
            report.fact("columns", "compared in the copy: if they changed since the target, the run replaces nothing")
            unlogged.judge_named(report, env, tables)
        acts = swap.acts(env) if mode == "swap" else table_acts(tables)
        pin_database(report, env.postgres, replaced=True)
        permit = report.permit(*acts, effect=_effect(report, env, copy, found, by, mode, tables))
        report.state_is("nothing live was touched", "fix the findings above, then run this again")
        choice.fetch_files(report, origin)
        if mode == "swap":
            _swap(report, permit, env, copy, instance, found, wanted, source)
        else:
            build.build(report, env, instance, origin, found.links, root / "wal")
            _copy_back(report, env, copy, instance, tables, found)
    return report


def _require_mode(mode: Mode, tables: list[str]) -> None:
    if mode == "tables":
        require_names(tables)
    elif tables:
        raise OpsError("tables are given, but mode=swap replaces the whole cluster", "choose mode=tables, or give none")


def _plan(
    report: Report, env: Environment, copy: ClusterCopy, found: FoundTarget, by: By, mode: Mode, tables: list[str]
) -> None:
    origin = copy.origin
    content, wal = origin.content, len(found.links) * origin.content.segment_bytes
    root, to_the_end = root_for(env.postgres), by == "latest"
    if mode == "swap" and to_the_end:
        swap.plan_stop(report, env)
    report.plan(
        "build the copy",
        f"{origin.backup.name} in {root}",
        size=content.bytes,
        seconds=build.expected_seconds(env, build.BUILD, content.bytes),
        by=build.BUILDS,
    )
    report.plan(
        "replay",
        f"{len(found.links)} segments of WAL",
        size=wal,
        seconds=build.expected_seconds(env, build.REPLAY, wal),
        by=[wait_recovered],
    )
    build.judge_tablespaces(report, env, origin, copy.stop, root / "wal", "swap" if mode == "swap" else "dump")
    sides = "the copy has the last transaction before the target, and not the first after it"
    report.plan("prove", sides, by=[read_standing])
    if mode == "swap":
        swap.plan(report, env, stopped=to_the_end)
        after = "afterwards: rejoin-standby and backup-cluster"
        healthy: list[CarriesOut] = [wait_healthy] if env.services_in(("backend", "frontend")) else []
        report.plan("start services", after, seconds=10, by=[start_services, analyze, *healthy])
    else:
        plan(report, tables)


def _effect(
    report: Report, env: Environment, copy: ClusterCopy, found: FoundTarget, by: By, mode: Mode, tables: list[str]
) -> Effect:
    before = copy.stop.before
    what = "all databases of the cluster" if mode == "swap" else first_of(tables)
    when = f"{clock.short(before.at)}" if before else "the end of the base backup"
    since = before.at if before else copy.origin.content.stopped
    if mode == "swap":
        down, lost = seconds_from(report.plan_steps, "stop services"), Loss.everything_since(copy.part, since)
        if by == "latest" or not found.more:
            lost = planned_loss(env, copy, found.lost, to_the_end=by == "latest")
        is_there = Path(env.postgres.data_directory).is_dir()
        undo = "undo-full-restore" if is_there else NoUndo("the data directory is missing, so nothing is kept")
        return Effect(f"{what} go back to {when}", undo, (lost,), down)
    lost = Loss.everything_since(what, since)
    if by == "latest" and copy.origin.unread:
        lost = Loss.not_known(what, copy.origin.unread)
    locked = "the tables are locked for the swap"
    return Effect(f"{what}: rows go back to {when}", "undo-restore-tables", (lost,), locked)


def _swap(
    report: Report,
    permit: Permit,
    env: Environment,
    copy: ClusterCopy,
    instance: PrivateInstance,
    found: FoundTarget,
    wanted: RecoveryTarget,
    source: Stores,
) -> None:
    origin = copy.origin
    services, wal, fenced = read_cluster_services(report, env), instance.root / "wal", None
    settings = server_state.read_live_settings(env)
    building = build.begin(env, instance, origin)  # while the services stop
    with started_on_failure(services):
        if wanted.by == "latest":  # with what is written until the fence
            fenced = fence_cluster(report, env, services, source)
            if (newest := choice.with_newest(origin)) is not origin:
                origin = newest
                found = point_target.find_in_wal(env, origin, wanted, wal)
                stop = point_target.judge_target(report, origin, wanted, found)
                copy = replace(copy, origin=origin, stop=stop, known=found.commits)
        links = len(found.links)
        build.build(report, env, instance, origin, found.links, wal, building)
        with running(instance, copy.stop, origin.chain.timeline.number, unsynced=True):
            build.recover(report, instance, origin, links)
            build.prove(report, instance, origin, copy.stop, found.commits)
            timeline = swap.promote(env, instance)
            build.compare(report, env, instance)
            server_state.judge_copy(report, settings, instance.postgres)
            copy = replace(copy, names=read_database_names(instance.postgres))
        sync_cluster(instance)
        swap.swap(report, permit, env, instance, services, timeline, copy, fenced)
        swap.start(report, permit, env, services)
    swap.report_follow_up(report, env, origin, services, timeline)
    bytes_ = len(origin.chain.links) * origin.content.segment_bytes
    report.measure("database point in time", origin.content.bytes + bytes_)
    report.outcome = "the cluster is at the target, proven on both sides"


def _copy_back(
    report: Report,
    env: Environment,
    copy: ClusterCopy,
    instance: PrivateInstance,
    tables: list[str],
    found: FoundTarget,
) -> None:
    origin, stop = copy.origin, copy.stop
    with running(instance, stop, origin.chain.timeline.number, unsynced=True):
        build.recover(report, instance, origin, len(found.links))
        build.prove(report, instance, origin, stop, found.commits)
        promote_instance(instance, {})  # a transaction that is left out may hold locks on the tables until then
        build.compare(report, env, instance)
        at = stop.before.at if stop.before else origin.content.stopped
        kept = keep(report, env, instance, tables, copy, at)
    done = restore_tables.fn(env.name, tables=tables, backup=kept.name, confirm=env.name)
    report.loses(*done.losses.values())
    report.table("Result of restore-tables", ("fact", "value"), list(done.facts.items()))
    report.state_is(f"the rows of {', '.join(tables)} were replaced", "run undo-restore-tables to restore them")
    report.undo_is(Next("undo-restore-tables"))
    report.outcome = f"{', '.join(tables)} have the rows of the target time ({done.outcome})"


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


COPY_BACK = "copy back"


def table_acts(tables: Sequence[str]) -> list[Act]:
    """The acts that need a permit; restore-tables has a separate one."""
    return [Act(COPY_BACK, name) for name in tables]


def plan(report: Report, tables: Sequence[str]) -> None:
    """Plan the restore of the tables."""
    dump = f"{', '.join(tables)}, into the store as a backup of tables"
    report.plan("dump from the copy", dump, by=[dump_globals, dump_database, publishing.publish])
    report.plan("restore-tables", "from that backup: proven, foreign keys checked, the old rows kept", seconds=5)


def keep(
    report: Report, env: Environment, instance: PrivateInstance, tables: Sequence[str], copy: ClusterCopy, at: datetime
) -> Backup:
    """Dump the copy's tables into the environment's store, as a backup with the target's time and place in WAL."""
    started = time.monotonic()
    unlogged.require_logged(report, instance.postgres, tables)
    found = choose_tables(instance.postgres, tables)
    store = store_for(env, "tables")
    name, directory = publishing.begin(store, "tables", env.name, env.zone)
    dump_globals(instance.postgres, directory)
    dumped = dump_database(instance.postgres, directory, 1, What("tables", found.names, found.others))
    # The copy was promoted: its own LSN and transactions are on a timeline that the live server does not know.
    place = {"lsn": lsn_text(copy.end), "timeline": copy.origin.chain.timeline.number, "snapshot": ""}
    manifest = Manifest(
        kind="tables",
        name=name,
        environment=env.name,
        taken=at,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        tool="pg_dump of a recovery to a point in time",
        files=sums_of(directory),
        content=dumped.content.model_copy(update=place).model_dump(mode="json"),
    )
    backup = publishing.publish(store, directory, manifest)
    report.fact("tables at the target, as a backup", backup.name)
    return backup


if __name__ == "__main__":
    sys.exit(exit_code(main))
