"""A region's recovery from base backup and WAL, or from a dump: built and proven first, then made live. A failure in
the first half touches nothing live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from blocks.environment import START_ORDER, Environment
from flows.database.gate import gate_of_backup
from flows.recovery.full import bring_up, build, cluster, database_server
from flows.recovery.full.choose import Chosen
from flows.recovery.full.cluster import ClusterCopies, ClusterRun
from flows.recovery.full.database_server import FoundServer
from flows.recovery.options import RestoreOptions
from flows.recovery.restore_option import RestoreOption
from flows.recovery.stopped_services import SystemServices, read_cluster_services, started_on_failure
from runbook.guard.loss import Loss
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.host.services import read_services
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import presence

Finish = Callable[[Loss], SystemServices]
"""Makes proven copies live, with the loss that the gate measured."""


@dataclass(frozen=True)
class Region:
    """What both recoveries need: the target region, the permit and the chosen backups."""

    report: Report
    permit: Permit
    env: Environment
    options: RestoreOptions
    option: RestoreOption
    chosen: Chosen
    strict: bool = False


def plan(report: Report, env: Environment, option: RestoreOption, chosen: Chosen) -> None:
    """Plan every step of a recovery."""
    if option.replay:
        cluster.plan(report, env, option, chosen, "the old region's")
    else:
        build.plan(report, env, chosen, database_server.judge(report, env, chosen.database), "at_swap")


def prepare(region: Region, stack: contextlib.ExitStack) -> Finish:
    """Build and prove the copies. Returns the function that makes them live. Locks and services are on `stack`.

    Raises:
        RunbookFailed, VerificationFailed: a copy fails its proof.
    """
    return _prepare_cluster(region) if region.option.replay else _prepare_dump(region, stack)


def _prepare_cluster(region: Region) -> Finish:
    run = ClusterRun(region.report, region.permit, region.env, region.options, region.chosen, region.strict)
    copies = cluster.build_copies(run, region.option)
    return lambda loss: _make_cluster_live(replace(run, measured=loss), copies)


def _make_cluster_live(run: ClusterRun, copies: ClusterCopies) -> SystemServices:
    report, permit, env = run.report, run.permit, run.env
    found = FoundServer(presence(env.postgres), read_services(env.services, env.services_in(START_ORDER)), None)
    services = bring_up.system_services(report, permit, env, run.chosen, found, last=copies)
    server = read_cluster_services(report, env)
    with cluster.swapping_in(run, copies, services, server):
        report_in_place(report, env, services.kept)
        cluster.start_cluster(run, copies, services, server)
        report.fact("timeline", f"{copies.timeline}; only this region has its WAL")
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

    def finish(loss: Loss) -> SystemServices:
        gate = gate_of_backup(report, env, chosen.database, live.oid)
        bring_up.swap(report, permit, env, guard, services, copies, live, chosen, advance=False, gate=gate)
        report.loses(loss)
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
