"""A region's recovery from base backup and WAL, or from a dump: built and proven first, then made live. A failure in
the first half touches nothing live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from blocks.environment import START_ORDER, Environment
from flows.database import expectations as check
from flows.recovery.full import bring_up, build, database_server, migration
from flows.recovery.full.build import StagedCopies
from flows.recovery.full.choose import Chosen
from flows.recovery.full.database_server import FoundServer
from flows.recovery.point import build as point_build
from flows.recovery.point import swap
from flows.recovery.region.options import Replay, RestoreOption
from flows.recovery.stopped_services import SystemServices, read_cluster_services, started_on_failure
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.cluster.instance import PrivateInstance, running
from tasks.cluster.swap import sync_cluster
from tasks.host.services import read_services
from tasks.postgres.content.content import read_counts
from tasks.postgres.restore.staged_copy import check_jobs, try_login
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import presence
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.fetch import fetch_histories

Finish = Callable[[], SystemServices]


@dataclass(frozen=True)
class Region:
    """What both recoveries need: the target region, the permit and the chosen backups."""

    report: Report
    permit: Permit
    env: Environment
    option: RestoreOption
    chosen: Chosen
    strict: bool = False


def plan(report: Report, env: Environment, option: RestoreOption, chosen: Chosen) -> None:
    """Plan every step of a recovery."""
    if not option.replay:
        build.plan(report, env, chosen, database_server.judge(report, env, chosen.database), "at_swap")
        return
    origin, links = option.replay.origin, len(option.replay.found.links)
    wal, content = links * origin.content.segment_bytes, origin.content
    report.plan(
        "build the cluster",
        f"{option.backup.name} in {option.replay.instance.root}",
        size=content.bytes,
        seconds=point_build.expected_seconds(env, point_build.BUILD, content.bytes),
    )
    report.plan(
        "replay",
        f"{links} segments of WAL",
        size=wal,
        seconds=point_build.expected_seconds(env, point_build.REPLAY, wal),
    )
    report.plan("prove", "the copy is the old region's cluster, with the last transaction of the WAL")
    check.plan(report, env)
    build.plan_others(report, env, chosen)
    migration.judge(report, env, "", chosen.files)
    swap.plan(report, env)
    build.plan_start(report, env)


def prepare(region: Region, stack: contextlib.ExitStack) -> Finish:
    """Build and prove the copies. Returns the function that makes them live. Locks and services are on `stack`.

    Raises:
        RunbookFailed, VerificationFailed: a copy fails its proof.
    """
    if region.option.replay:
        return _prepare_cluster(region, region.option.replay)
    return _prepare_dump(region, stack)


def _prepare_cluster(region: Region, replay: Replay) -> Finish:
    report, env, chosen = region.report, region.env, region.chosen
    origin, instance, stop = replay.origin, replay.instance, replay.stop
    point_build.build(report, env, instance, origin, replay.found.links, instance.root / "wal")
    # An earlier run in this region may have used the next timeline's number: the archive would refuse it.
    fetch_histories(archive_of(env, "backups", origin.content.system), instance.wal)
    with running(instance, stop, origin.chain.timeline.number, unsynced=True):
        point_build.recover(report, instance, origin, len(replay.found.links))
        point_build.prove(report, env, instance, origin, stop)
        rows = dict(read_counts(instance.postgres, env.postgres.database).rows)
        timeline = swap.promote(env, instance)
    sync_cluster(instance)
    copies = build.build_others(region.permit, env, chosen)
    build.prove_others(report, env, chosen, copies)
    copies.rows, copies.strict = rows, region.strict
    return lambda: _make_cluster_live(region, instance, copies, timeline)


def _make_cluster_live(
    region: Region, instance: PrivateInstance, copies: StagedCopies, timeline: int
) -> SystemServices:
    report, permit, env, chosen = region.report, region.permit, region.env, region.chosen
    found = FoundServer(presence(env.postgres), read_services(env.services, env.services_in(START_ORDER)), None)
    services = bring_up.system_services(report, permit, env, chosen, found, last=copies)
    cluster = read_cluster_services(report, env)
    with started_on_failure(services), started_on_failure(cluster):
        swap.swap(report, permit, env, instance, cluster, timeline)
        services.has_swapped("database", ", ".join(cluster.kept), bring_up.others_in(copies))
        services.last = cluster.last
        services.stop()
        bring_up.swap_others(report, permit, env, services, copies)
        report_in_place(report, env, services.kept)
        cluster.last = services.last
        swap.start_server(report, permit, env, cluster)
        user = try_login.after(cluster.last)(env.postgres, env.postgres.database)
        name = env.postgres.database
        services.last = migration.migrate(report, permit, env, name, None, revision="", after=user) or user
        report.fact("timeline", f"{timeline}; only this region has its WAL")
    bring_up.start(report, env, copies, services)
    return services


def _prepare_dump(region: Region, stack: contextlib.ExitStack) -> Finish:
    report, permit, env, chosen = region.report, region.permit, region.env, region.chosen
    workers = check_jobs(0)
    found = database_server.judge(report, env, chosen.database)
    report.fail_if_critical()
    live = database_server.start_database(report, permit, env, chosen.database, found)
    guard = stack.enter_context(advisory_lock(env.postgres))
    services = bring_up.system_services(report, permit, env, chosen, found, last=live)
    stack.enter_context(started_on_failure(services))
    copies = build.build(report, permit, env, chosen, workers)
    build.prove(report, permit, env, chosen, copies, jobs=workers, strict=region.strict)

    def finish() -> SystemServices:
        bring_up.swap(report, permit, env, guard, services, copies, live, chosen, advance=False)
        report_in_place(report, env, services.kept)
        bring_up.start(report, env, copies, services)
        return services

    return finish


def report_in_place(report: Report, env: Environment, kept: list[str]) -> None:
    """The state between the swap and the redirection of users."""
    replaced = f"; the replaced data is kept: {', '.join(kept)}" if kept else ""
    report.state_is(
        f"the data is in place in {env.name}, and no user is sent to it yet{replaced}",
        f"fix the findings above, then run it again with confirm={env.name}: it restores everything from the start",
    )
