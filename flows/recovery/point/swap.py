"""The swap of the whole cluster: services stopped, the copy in the live place, everything that can follow it started,
and said what cannot. Called with the open report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import START_ORDER, STOP_ORDER, Environment
from flows.application.health_checks import report_health, report_smoke
from flows.database.waiting_commits import free_commits
from flows.recovery.point.choice import Origin, ship
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.units import duration
from runbook.wait import until
from tasks.application.health import smoke_check, wait_healthy
from tasks.cluster.instance import Instance
from tasks.cluster.recovery import promote_instance
from tasks.cluster.swap import REPLACE_CLUSTER, ensure_wal_directory, set_wal_aside, superseded_clusters, swap_cluster
from tasks.host.services import read_services, start_services, stop_services
from tasks.postgres.replication.synchronous import ALONE, address
from tasks.postgres.restore.planner_statistics import analyze

START_SECONDS, ATTACH_SECONDS, HEALTH_SECONDS = 300.0, 30.0, 120
# Redis stays: sessions and queues newer than the database are told.
APPLICATION = tuple(role for role in STOP_ORDER if role not in ("redis", "postgres"))


def acts(env: Environment) -> list[Act]:
    """What a permit is needed for."""
    return [Act(REPLACE_CLUSTER, env.postgres.data_directory), Act(ALONE, address(env.postgres))]


def plan(report: Report, env: Environment) -> None:
    """The plan's lines."""
    stop = [*env.services_in(APPLICATION), *_followers(env), env.postgres.service]
    live = env.postgres.data_directory
    report.plan("promote the copy", "it begins a new timeline", seconds=1)
    report.plan("stop services", ", ".join(stop), seconds=5)
    report.plan("swap", f"the copy becomes {live}; the old one is kept as {live}.superseded_…", seconds=0.1)
    if env.has("wal"):
        report.plan("receive WAL anew", f"what {env.wal.directory} holds is archived, then kept aside")
    report.plan("start services", "; then the standby must be built anew, and a base backup taken", seconds=10)


def _followers(env: Environment) -> list[str]:
    """Roles of those who follow the primary."""
    found = [env.standby.service] if env.has("standby") else []
    return [role for role in (*found, *([env.wal.service] if env.has("wal") else [])) if role in env.services.names]


@dataclass
class Held:
    """The services of one swap: which ran when it began, since when they are stopped, and what is kept aside."""

    report: Report
    env: Environment
    running: list[str]
    stopped_at: datetime | None = None
    swapped: bool = False
    kept: list[str] = field(default_factory=list)
    last: object = None

    def stop(self) -> None:
        """Who writes first, then who follows, then the server; the receiver last: it has everything then."""
        self.stopped_at = datetime.now(UTC)
        env = self.env
        receiver = env.wal.service if env.has("wal") else ""
        order = [*env.services_in(APPLICATION), *(role for role in _followers(env) if role != receiver)]
        order += [env.postgres.service, *([receiver] if receiver in env.services.names else [])]
        self.last = stop_services.after(self.last)(env.services, order)

    def start_again(self) -> None:
        """What ran when the run began. A failure of that must not hide why it is done."""
        order = [self.env.postgres.service, *_followers(self.env), *START_ORDER]
        try:
            start_services(self.env.services, [role for role in dict.fromkeys(order) if role in self.running])
        except OpsError as error:
            self.report.fail("services started again", error.hint, value=error.message)
            self.report.state_is(
                "nothing live was replaced; services were stopped, and not all of them run again",
                f"start {', '.join(self.running)} by hand, then launch this again",
            )


@contextlib.contextmanager
def services_held(report: Report, env: Environment) -> Iterator[Held]:
    """Where the run fails before anything was swapped, they are as they were found."""
    roles = dict.fromkeys([*env.services_in(START_ORDER), env.postgres.service, *_followers(env)])
    states = read_services(env.services, list(roles))
    held = Held(report, env, [role for role, runs in states.running.items() if runs])
    try:
        yield held
    except BaseException:
        if held.stopped_at and not held.swapped:
            held.start_again()
        raise


def promote(env: Environment, instance: Instance) -> int:
    """The copy takes writes, with the receiver's slot from its first moment on: none of its WAL is missed."""
    slots = {env.wal.slot: True} if env.has("wal") and env.wal.method == "receivewal" else {}
    return promote_instance(instance, slots)


def swap(report: Report, permit: Permit, env: Environment, instance: Instance, held: Held, timeline: int) -> None:
    """Stop, archive the old timeline's end, rename, start."""
    primary = env.postgres  # its role is not asked for again: it is down from here on
    held.stop()
    if env.has("wal"):
        ship(report, env, "backups")  # the old timeline's last WAL: it can be gone back to
    report.state_is(
        f"services are stopped; look at {primary.data_directory}: if it is not there, the old one is beside it as "
        "….superseded_…, and nothing is live",
        f"launch it again with confirm={env.name}: it begins anew and ends well; or rename the newest ….superseded_… "
        "back and start the services: then nothing was changed",
    )
    done = swap_cluster.after(held.last)(permit, primary, instance)
    held.swapped, held.last = True, done
    held.kept += [str(done.kept)] if done.kept else []
    report.state_is(
        f"the cluster stands at the target, on timeline {timeline}, and is live; services are stopped or starting; "
        f"kept aside: {', '.join(held.kept) or 'nothing'}",
        "do not restore again: that loses what was written since. Start the services in the order postgres, receiver, "
        "backend, frontend, then backup-cluster",
    )
    if env.has("wal"):
        wal = Path(env.wal.directory)
        held.last = aside = set_wal_aside.after(held.last)(permit, primary, wal)
        held.kept += [str(aside)] if aside else []


def start(report: Report, permit: Permit, env: Environment, held: Held) -> None:
    """The server, the receiver, then who writes."""
    start_server(report, permit, env, held)
    analyze.after(held.last)(env.postgres, env.postgres.database, 2)
    roles = env.services_in(("backend", "frontend"))
    if roles:
        held.last = start_services.after(held.last)(env.services, roles)
        health = wait_healthy.after(held.last)(env.application, seconds=HEALTH_SECONDS, services=env.services)
        report_health(report, health)
        report_smoke(report, smoke_check.after(health)(env.application))
    if held.stopped_at:
        outage = (datetime.now(UTC) - held.stopped_at).total_seconds()
        report.fact("services out of order for", duration(outage))


def start_server(report: Report, permit: Permit, env: Environment, held: Held) -> None:
    """The server, the receiver, the archiver; commits wait for nobody where nobody is there to confirm them."""
    primary = env.postgres
    held.last = start_services.after(held.last)(env.services, [primary.service])
    until(lambda: _answers(env), what="the server's answer on the live port", seconds=START_SECONDS)
    if env.has("wal"):
        ensure_wal_directory(primary, Path(env.wal.directory))
        if env.wal.service in env.services.names:
            held.last = start_services.after(held.last)(env.services, [env.wal.service])
            _judge_receiver(report, env)
        if env.wal.archiver in env.services.names:
            held.last = start_services.after(held.last)(env.services, [env.wal.archiver])
    env.forget_roles()
    free_commits(report, permit, env, after=held.last)


def _answers(env: Environment) -> bool:
    with env.postgres.connect(seconds=2) as connection:
        row = connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()
    return bool(row and row[0])


def _judge_receiver(report: Report, env: Environment) -> None:
    name = env.wal.name

    def streams() -> bool:
        with env.postgres.connect(seconds=2) as connection:
            query = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
            return connection.execute(query, [name]).fetchone() is not None

    try:
        until(streams, what=f"the stream to {name}", seconds=ATTACH_SECONDS)
        told = "streams the new timeline"
    except Unreachable as error:
        told = error.message
    report.prefer(
        "receiver of WAL",
        told.startswith("streams"),
        f"look at the log of {env.wal.service}, and whether slot {env.wal.slot} is there",
        value=told,
    )


def tell_after(report: Report, env: Environment, origin: Origin, held: Held, timeline: int) -> None:
    """What a swap leaves to do: until then the run is not OK."""
    primary = env.postgres
    report.fact("timeline", f"{timeline} (it came from {origin.chain.timeline.number})")
    report.fact("kept aside", ", ".join(held.kept) or "nothing: there was nothing left")
    report.fact(
        "undo",
        f"stop the services, rename {primary.data_directory} away and the kept one back, start them: "
        "what was written since is in the one that was renamed away",
    )
    report.warn(
        "no base backup of the new timeline",
        f"backup-cluster with kind=full, now: until then a recovery starts from {origin.backup.name}",
        value=f"timeline {timeline}",
    )
    if env.has("standby"):
        report.warn(
            "the standby is ahead of the new timeline, and stopped",
            "rejoin-standby builds it anew; until then there is nothing to fail over to",
            value=env.standby.service,
        )
    if env.has("redis"):
        report.warn(
            "Redis is newer than the database",
            "sessions and queues may name rows that are gone: restore-redis, or clear-cache where only caches matter",
            value="it was not touched",
        )
    old = superseded_clusters(primary)
    if len(old) > 1:
        report.warn("old data directories", "remove those that nobody needs", value=", ".join(map(str, old)))
