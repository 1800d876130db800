"""The two ways of a region's recovery, each in two halves: beside and proven, then live. What fails in the first half
has touched nothing that serves. Called with the open report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from blocks.environment import START_ORDER, Environment
from flows.database import expectations as check
from flows.recovery.full import bring_up, build, database_server, migration
from flows.recovery.full.build import Beside
from flows.recovery.full.choose import Chosen
from flows.recovery.full.database_server import Found
from flows.recovery.full.stopped_services import Held, services_held
from flows.recovery.point import build as point_build
from flows.recovery.point import swap
from flows.recovery.region.options import Replay, Way
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.cluster.instance import Instance, running
from tasks.cluster.recovery import wait_recovered
from tasks.host.services import read_services
from tasks.postgres.content.content import read_counts
from tasks.postgres.restore.staged_copy import check_jobs, try_login
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import presence
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.fetch import fetch_histories

Finish = Callable[[], Held]


@dataclass(frozen=True)
class Region:
    """What both ways need: the region to go to, and what comes back to it."""

    report: Report
    permit: Permit
    env: Environment
    way: Way
    chosen: Chosen
    strict: bool = False


def plan(report: Report, env: Environment, way: Way, chosen: Chosen) -> None:
    """Every step of a way."""
    if not way.replay:
        build.plan(report, env, chosen, database_server.judge(report, env, chosen.database), "at_swap")
        return
    origin, links = way.replay.origin, len(way.replay.found.links)
    wal, content = links * origin.content.segment_bytes, origin.content
    report.plan(
        "build the cluster",
        f"{way.backup.name} in {way.replay.instance.root}",
        size=content.bytes,
        seconds=content.bytes / 150e6,
    )
    report.plan("replay", f"{links} segments of WAL", size=wal, seconds=wal / 60e6)
    report.plan("prove", "the last transaction in the WAL is there, the cluster is the old region's")
    check.plan(report, env)
    build.plan_others(report, env, chosen)
    migration.judge(report, env, "", chosen.files)
    swap.plan(report, env)
    build.plan_start(report, env)


def prepare(region: Region, stack: contextlib.ExitStack) -> Finish:
    """Everything beside, and proven; what makes it live is returned. What must be held until then is on the stack.

    Raises:
        RunbookFailed, VerificationFailed: it does not stand its proof.
    """
    if region.way.replay:
        return _prepare_cluster(region, region.way.replay)
    return _prepare_dump(region, stack)


def _prepare_cluster(region: Region, replay: Replay) -> Finish:
    report, env, chosen = region.report, region.env, region.chosen
    origin, instance, stop = replay.origin, replay.instance, replay.stop
    point_build.build(env, instance, origin, replay.found.links, instance.root / "wal")
    # What an earlier run in this region began has its number: another one of the same would be refused by the archive.
    fetch_histories(archive_of(env, "backups", origin.content.system), instance.wal)
    with running(instance, stop, origin.chain.timeline.number):
        wait_recovered(instance, origin.content.system)
        point_build.prove(report, env, instance, origin, stop)
        rows = dict(read_counts(instance.postgres, env.postgres.database).rows)
        timeline = swap.promote(env, instance)
    beside = build.build_others(region.permit, env, chosen)
    build.prove_others(report, env, chosen, beside)
    beside.rows, beside.strict = rows, region.strict
    return lambda: _make_cluster_live(region, instance, beside, timeline)


def _make_cluster_live(region: Region, instance: Instance, beside: Beside, timeline: int) -> Held:
    report, permit, env, chosen = region.report, region.permit, region.env, region.chosen
    found = Found(presence(env.postgres), read_services(env.services, env.services_in(START_ORDER)), None)
    with (
        services_held(report, permit, env, chosen, found, "at_swap", beside) as held,
        swap.services_held(report, env) as server,
    ):
        swap.swap(report, permit, env, instance, server, timeline)
        held.has_swapped("database", ", ".join(server.kept), bring_up.others_in(beside))
        held.last = server.last
        held.stop()
        bring_up.swap_others(report, permit, env, held, beside)
        not_yet(report, env, held.kept)
        server.last = held.last
        swap.start_server(report, permit, env, server)
        user = try_login.after(server.last)(env.postgres, env.postgres.database)
        name = env.postgres.database
        held.last = migration.migrate(report, permit, env, name, None, revision="", after=user) or user
        report.fact("timeline", f"{timeline}, of which this region alone has WAL")
    bring_up.start(report, env, beside, held)
    return held


def _prepare_dump(region: Region, stack: contextlib.ExitStack) -> Finish:
    report, permit, env, chosen = region.report, region.permit, region.env, region.chosen
    workers = check_jobs(0)
    found = database_server.judge(report, env, chosen.database)
    report.fail_if_critical()
    live = database_server.revive(report, permit, env, chosen.database, found)
    guard = stack.enter_context(advisory_lock(env.postgres))
    held = stack.enter_context(services_held(report, permit, env, chosen, found, "at_swap", live))
    copies = build.build(report, permit, env, chosen, workers)
    build.prove(report, permit, env, chosen, copies, jobs=workers, strict=region.strict)

    def finish() -> Held:
        bring_up.swap(report, permit, env, guard, held, copies, live, chosen, advance=False)
        not_yet(report, env, held.kept)
        bring_up.start(report, env, copies, held)
        return held

    return finish


def not_yet(report: Report, env: Environment, kept: list[str]) -> None:
    """What is so from the swap on, until users are sent here."""
    aside = f"; kept aside: {', '.join(kept)}" if kept else ""
    report.state_is(
        f"the data is in place in {env.name}, and no user is sent to it yet{aside}",
        f"put right what is said above, then launch it again with confirm={env.name}: it begins anew and ends well",
    )
