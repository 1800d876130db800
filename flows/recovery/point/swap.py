"""The swap of the whole cluster: stop the services, put the copy into the live directory, start what can follow it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.application.health_checks import report_health, report_smoke
from flows.branch import record_branch
from flows.database.waiting_commits import free_commits
from flows.recovery import gate
from flows.recovery.point import server_state
from flows.recovery.point.choice import PointOrigin
from flows.recovery.stopped_services import APPLICATION, ClusterServices, replication_roles
from runbook.errors import Unreachable
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration
from runbook.wait import until
from tasks.application.health import answers, smoke_check, wait_healthy
from tasks.cluster.fence import FencedServer, read_fence
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.recovery import promote_instance
from tasks.cluster.swap import (
    REPLACE_CLUSTER,
    ensure_wal_directory,
    set_wal_aside,
    superseded_clusters,
    swap_cluster,
    sync_cluster,
)
from tasks.host.services import start_services, stop_services
from tasks.postgres.replication.synchronous import ALONE, address
from tasks.postgres.restore.planner_statistics import analyze

START_SECONDS, ATTACH_SECONDS, HEALTH_SECONDS = 300.0, 30.0, 120


def acts(env: Environment) -> list[Act]:
    """The acts that need a permit."""
    return [Act(REPLACE_CLUSTER, env.postgres.data_directory), Act(ALONE, address(env.postgres))]


def servers(env: Environment) -> list[str]:
    """The servers that are stopped for a swap, after the application."""
    return [*replication_roles(env), env.postgres.service]


def plan_stop(report: Report, env: Environment) -> None:
    """Plan the stop of the application and the servers."""
    stop = ", ".join([*env.services_in(APPLICATION), *servers(env)])
    report.plan("stop services", stop, seconds=5, by=[stop_services, read_fence])


def plan(report: Report, env: Environment, *, stopped: bool = False) -> None:
    """Plan the swap. `stopped`: the application and the servers are stopped already."""
    server_state.plan(report, env)
    live = env.postgres.data_directory
    report.plan("promote the copy", "on a new timeline", seconds=1, by=[promote_instance])
    sync = "every file is on disk before the swap: it is recovered without fsync"
    report.plan("sync the copy", sync, seconds=1, by=[sync_cluster])
    if not stopped:
        plan_stop(report, env)
    lacks = "the copy lacks no commit of the stopped server beyond the planned loss"
    report.plan("compare with the live server", lacks, seconds=1, by=[gate.measure])
    swapped = f"the copy becomes {live}; the replaced one is kept as {live}.superseded_…"
    report.plan("swap", swapped, seconds=0.1, by=[swap_cluster])
    if env.has("wal"):
        aside = f"{env.wal.directory} is archived first, then kept under another name"
        report.plan("restart the WAL receiver", aside, by=[set_wal_aside])


def promote(env: Environment, instance: PrivateInstance) -> int:
    """Promote the copy. It has the WAL receiver's slot before it takes writes, so the receiver misses no WAL."""
    slots = {env.wal.slot: True} if env.has("wal") and env.wal.method == "receivewal" else {}
    return promote_instance(instance, slots)


def swap(
    report: Report,
    permit: Permit,
    env: Environment,
    instance: PrivateInstance,
    services: ClusterServices,
    timeline: int,
    copy: gate.ClusterCopy,
    fenced: FencedServer | None = None,
    measured: Loss | None = None,
) -> Loss:
    """Fence the live server unless it is, pass the gate, rename, and record the new timeline. `measured`: see
    `pass_cluster`. Returns what is lost.

    Raises:
        LossExceeded: more than was confirmed. Nothing live was replaced.
    """
    primary = env.postgres  # not read again: the server is down from here on
    server_state.rehearse(report, env, instance)
    loss = gate.pass_cluster(report, env, services, copy, fenced, measured)
    report.state_is(
        f"services are stopped; if {primary.data_directory} is missing, the live data is in ….superseded_… next to it",
        f"run it again with confirm={env.name}: it restores everything from the start. To go back instead, run "
        "undo-full-restore",
    )
    done = swap_cluster.after(services.last)(permit, primary, instance)
    services.swapped.append("cluster")
    services.last = done
    services.kept += [str(done.kept)] if done.kept else []
    report.loses(loss)
    gate.forget_swap(env)
    report.state_is(
        f"the cluster is at the target, on timeline {timeline}, and is live; services are stopped or starting; "
        f"the replaced data is kept: {', '.join(services.kept) or 'there was none'}",
        "do not restore again: that loses what was written since. Start the services in the order postgres, WAL "
        "receiver, backend, frontend, then run backup-cluster",
    )
    if done.tablespaces:
        report.warn(
            "tablespaces of the restored cluster",
            f"their former directories belong to {done.kept or 'the lost data'}: delete them together with it",
            value=", ".join(f"OID {oid} in {path}" for oid, path in done.tablespaces.items()),
        )
    if env.has("wal"):
        wal = Path(env.wal.directory)
        services.last = aside = set_wal_aside.after(services.last)(permit, primary, wal)
        services.kept += [str(aside)] if aside else []
        origin = copy.origin
        left = [origin.chain.timeline.number]
        record_branch(report, env, origin.content.system, timeline, left, after=services.last)
    return loss


def start(
    report: Report, permit: Permit, env: Environment, services: ClusterServices, *, has_statistics: bool = False
) -> None:
    """Start the server and the WAL receiver, then the application. `has_statistics`: the planner's, of its own."""
    start_server(report, permit, env, services)
    if not has_statistics:
        analyze.after(services.last)(env.postgres, env.postgres.database, 2)
    services.all_started()
    roles = env.services_in(("backend", "frontend"))
    if roles:
        healthy = partial(answers, env.application)
        services.last = start_services.after(services.last)(env.services, roles, answers=healthy)
        health = wait_healthy.after(services.last)(env.application, seconds=HEALTH_SECONDS, services=env.services)
        report_health(report, health)
        report_smoke(report, smoke_check.after(health)(env.application))
    if services.stopping_at:
        outage = (datetime.now(UTC) - services.stopping_at).total_seconds()
        report.fact("outage", duration(outage))


def start_server(report: Report, permit: Permit, env: Environment, services: ClusterServices) -> None:
    """Start the server, the WAL receiver and the archiver. Commits wait for no standby while none is connected."""
    primary = env.postgres
    services.last = start_services.after(services.last)(
        env.services, [primary.service], answers=lambda _: takes_writes(env)
    )
    until(lambda: takes_writes(env), what="an answer of the server on the live port", seconds=START_SECONDS)
    if env.has("wal"):
        ensure_wal_directory(primary, Path(env.wal.directory))
        if env.wal.service in env.services.names:
            services.last = start_services.after(services.last)(
                env.services, [env.wal.service], answers=lambda _: _streams(env)
            )
            _judge_receiver(report, env)
        if env.wal.archiver in env.services.names:  # nothing waits for it
            services.starting = start_services.after(services.last).submit(env.services, [env.wal.archiver])
    env.forget_roles()
    free_commits(report, permit, env, after=services.last)


def takes_writes(env: Environment) -> bool:
    """Whether the server answers, and is no standby.

    Raises:
        Unreachable: it does not answer.
    """
    with env.postgres.connect(seconds=2) as connection:
        row = connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()
    return bool(row and row[0])


def _streams(env: Environment) -> bool:
    with env.postgres.connect(seconds=2) as connection:
        query = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
        return connection.execute(query, [env.wal.name]).fetchone() is not None


def _judge_receiver(report: Report, env: Environment) -> None:
    try:
        until(lambda: _streams(env), what=f"the stream to {env.wal.name}", seconds=ATTACH_SECONDS)
    except Unreachable as error:
        hint = f"check the log of {env.wal.service}, and that the slot {env.wal.slot} exists"
        report.warn("WAL receiver", hint, value=error.message)
    else:
        report.passed("WAL receiver", value="streams the new timeline")


def undo_of(primary: Postgres, kept: Sequence[str]) -> Next | None:
    """The undo of a swap, by the directory that it kept; None where there was no data directory."""
    names = [
        Path(one).name for one in kept if Path(one).name.startswith(f"{Path(primary.data_directory).resolve().name}.")
    ]
    return Next("undo-full-restore", "", {"kept": names[0]}) if names else None


def report_follow_up(
    report: Report,
    env: Environment,
    origin: PointOrigin,
    services: ClusterServices,
    timeline: int,
    *,
    redis_is_newer: bool = True,
) -> None:
    """Report what is left to do after a swap. Until then the run is not OK. `redis_is_newer`: it was not restored."""
    primary = env.postgres
    report.fact("timeline", f"{timeline} (from timeline {origin.chain.timeline.number})")
    report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")
    if not report.undo and (undo := undo_of(primary, services.kept)):
        report.undo_is(undo)
    report.warn(
        "no base backup of the new timeline",
        f"take one now: until then a recovery starts from {origin.backup.name}",
        value=f"timeline {timeline}",
        follow=[Next("backup-cluster", "take a base backup", {"kind": "full"})],
    )
    if env.has("standby"):
        report.warn(
            "standby",
            "rebuild it now: until then there is no server to fail over to",
            value=f"{env.standby.service} is stopped: it has WAL beyond the new timeline's start",
            follow=[Next("rejoin-standby", "rebuild the standby")],
        )
    if redis_is_newer and env.has("redis"):
        report.warn(
            "Redis is newer than the database",
            "restore Redis to the same time, or clear it if it is only a cache: its keys may refer to rows that no "
            "longer exist",
            value="Redis was not changed",
            follow=[Next("restore-redis", "restore Redis"), Next("clear-cache", "clear the cache")],
        )
    old = superseded_clusters(primary)
    if len(old) > 1:
        report.warn("replaced data directories", "delete those that are not needed", value=", ".join(map(str, old)))
