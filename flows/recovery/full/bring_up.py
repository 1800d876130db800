"""The second and third phase of a full restore: swap the database; start the services; check them. (Redis and the
files: parts.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from blocks.environment import STOP_ORDER, Environment
from blocks.postgres.server import Connection
from flows.application.health_checks import report_health, report_smoke
from flows.database import expectations as check
from flows.database import restore_steps as database
from flows.database.gate import DatabaseGate
from flows.database.staged_restore import SWAP_SECONDS
from flows.recovery.full.build import SystemCopies
from flows.recovery.full.choose import Chosen, OtherParts, other_master
from flows.recovery.full.parts import StagedCopies
from flows.recovery.point.start import takes_writes
from flows.recovery.stopped_services import SystemServices
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.sources import plan_kept
from flows.redis.restore.steps import attach_step, report_not_attached
from flows.store import mark_verified
from runbook.change import Carrier, Change, Check, Line
from runbook.errors import OpsError
from runbook.kinds import Pending
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration
from tasks.application.health import Health, answers, smoke_check, wait_healthy
from tasks.application.stored import find_stored
from tasks.host.services import ServiceStates, start_services
from tasks.integrity import Expectations
from tasks.logs.figures.writes import read_writes_since
from tasks.postgres.content.content import RowCounts, read_counts
from tasks.postgres.restore.swap import Swapped, SwapUnknown, swap_databases
from tasks.postgres.server.server import Identity
from tasks.redis.restore.swap import prepare_empty, start_redis, verify_live_redis
from tasks.redis.restore.undoing import note_started
from tasks.redis.topology.isolation import Attached, attach, wait_for_followers
from tasks.redis.topology.topology import ReplicationTopology

START_ESTIMATE_SECONDS = 8.0
HEALTH_SECONDS = 120


def system_services(report: Report, env: Environment, chosen: OtherParts, services: ServiceStates) -> SystemServices:
    """The services of the run, with those that it found running."""
    running = [role for role in STOP_ORDER if role in services.wanted]
    topology, live = chosen.redis_topology, chosen.redis_live
    return SystemServices(
        *(report, env, running),
        topology=topology,
        redis_kept=chosen.redis_kept,
        stops_redis=env.has("redis") and chosen.stops_redis,
        other_master=other_master(env, chosen),
        redis_gate=RedisGate(report, env, topology, live) if topology and live else None,
    )


Swap = Change[[Identity, str, DatabaseGate, Connection, SystemCopies], Swapped]


def plan_swap(report: Report, env: Environment, services: SystemServices) -> Swap:
    """Plan to give the copy of the database the live name."""
    action = swap_databases.bind(env.postgres)

    def swap(live: Identity, name: str, gate: DatabaseGate, guard: Connection, copies: SystemCopies) -> Swapped:
        try:
            services.last = done = action(live.oid, name, gate.judge, guard, copies.database)
        except SwapUnknown:
            services.may_have_swapped("database", copies.others)
            raise
        services.has_swapped("database", done.kept, copies.others, Next("undo-restore", "", {"kept": done.kept}))
        report.loses(gate.measured)
        return done

    return Change(swap, "swap", database.swap_text(env, kept=True), seconds=SWAP_SECONDS, by=[action], is_final=True)


@dataclass(frozen=True)
class StartedApplication:
    """The application runs. `problems`: how the live Redis differs from its copy. `attaching`: the replicas and
    Sentinels of Redis."""

    health: Health
    problems: Sequence[str]
    attaching: Pending[Attached] | None


@dataclass
class LiveChecks:
    """What is checked of the live database, at the same time as the application starts."""

    counting: Pending[RowCounts]
    checking: Pending[Expectations] | None


@dataclass(frozen=True)
class SystemStart:
    """The lines that start the services, and check them. `kept`: of a Redis that serves all the time; `reattach`: of
    its replicas and Sentinels. Empty where there are none."""

    report: Report
    env: Environment
    services: SystemServices
    start: Change[[StagedCopies, object], StartedApplication]
    kept: Sequence[Check[[object], None]]
    check: Check[[StagedCopies, StartedApplication, LiveChecks | None], None]
    reattach: Sequence[Change[[Pending[Attached]], None]]

    @classmethod
    def plan(cls, report: Report, env: Environment, chosen: OtherParts, services: SystemServices) -> SystemStart:
        """Plan the lines."""
        roles = env.services_in(("redis", "backend", "frontend"))
        started = [role for role in roles if role != "redis" or chosen.stops_redis]
        checks = ["health", *["expectations again"] * env.has("postgres"), "smoke checks"]
        around = services.topology
        attaching = [] if around is None or around.is_alone else [_plan_reattaching(report, env, around)]
        return cls(
            *(report, env, services),
            Change(
                partial(start_application, env, services),
                "start services",
                ", ".join(started),
                seconds=START_ESTIMATE_SECONDS,
                by=[attach.bind(env.redis)] if attaching else [],
            ),
            [plan_kept(report, env, chosen.redis_kept)] if chosen.redis_kept else [],
            Check(partial(_check, report, env, services), "check", ", ".join(checks)),
            attaching,
        )

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        return [self.start, *self.kept, self.check, *self.reattach]

    def carry_out(self, carry: Carrier, copies: StagedCopies) -> None:
        """Start the services, then check the health, Redis, row counts, expectations and the application.

        Raises:
            OpsError: the backend does not become healthy.
        """
        report, env, services = self.report, self.env, self.services
        prepare_redis(report, env, copies, services)
        live, checks, whole = env.postgres.database if env.has("postgres") else "", None, None
        if live:
            if copies.states is None:
                whole = check.start(report, env, live, after=services.last, origin=copies.origin)
            checks = LiveChecks(read_counts.after(services.last).submit(env.postgres, live), whole)
            services.last = start_services.after(services.last)(
                env.services, env.services_in((env.postgres.service,)), answers=lambda _: takes_writes(env)
            )
        started = carry(self.start, copies, services.last)
        if checks and not whole:
            # Of rules that a copy kept, only the application's writes since can have broken one.
            checks.checking = check.start(
                report, env, live, after=started.health, origin=copies.origin, since=copies.states
            )
        report_started(report, copies, services, started)
        for kept in self.kept:
            carry(kept, started.health)
        carry(self.check, copies, started, checks)
        for line in self.reattach:
            if started.attaching:
                carry(line, started.attaching)
            else:
                carry.skip(line, "Redis does not serve the restored data")


def _plan_reattaching(
    report: Report, env: Environment, around: ReplicationTopology
) -> Change[[Pending[Attached]], None]:
    action, step = wait_for_followers.bind(env.redis), attach_step(around)

    def reattach(attaching: Pending[Attached]) -> None:
        report_not_attached(report, action(attaching.result(), env.reports_directory))

    return Change(reattach, step.step, step.detail, seconds=step.seconds, by=[action])


def prepare_redis(report: Report, env: Environment, copies: StagedCopies, services: SystemServices) -> None:
    """Give Redis a data directory, if it starts without a restored copy and has none."""
    if copies.redis is None and services.stops_redis and (done := prepare_empty(env.redis)):
        report.warn("Redis data directory", "check its content, and back up Redis too", value=done)


def start_application(
    env: Environment, services: SystemServices, copies: StagedCopies, after: object
) -> StartedApplication:
    """Start Redis and verify its data, then start the application and wait until it is healthy.

    Raises:
        OpsError: Redis does not start, or the backend does not become healthy.
    """
    started = after
    if services.stops_redis:
        started = start_redis.after(started)(env.redis, env.services)
        note_started(env.redis, env.reports_directory, services.redis_replaced)
    problems = verify_live_redis.after(started)(env.redis, copies.redis) if copies.redis else ()
    # The backend finds its master through the Sentinels; the replicas may follow while the application is checked.
    attaching = _attach(services) if not problems else None
    roles, healthy = env.services_in(("backend", "frontend")), partial(answers, env.application)
    started = start_services.after(started)(env.services, roles, answers=healthy)
    try:
        health = wait_healthy.after(started)(env.application, seconds=HEALTH_SECONDS, services=env.services)
    except OpsError:
        if attaching:
            attaching.result()  # Sentinels that name no master are the reason, where it fails too
        raise
    return StartedApplication(health, problems, attaching)


def report_started(report: Report, copies: StagedCopies, services: SystemServices, started: StartedApplication) -> None:
    """Report the health, the outage and Redis's live data."""
    report_health(report, started.health)
    if services.stopping_at:
        outage = (datetime.now(UTC) - services.stopping_at).total_seconds()
        report.fact("outage", f"{duration(outage)}, from the stop of the services until they were healthy")
    if copies.redis:
        report.require(
            "Redis live",
            not started.problems,
            "check its log; the replaced data is kept",
            value="; ".join(started.problems[:3]) or "all keys without TTL are present",
        )
    if services.undo:
        report.undo_is(*services.undo)
    else:
        report.fact("undo", "none: there was no live data, so nothing is kept")


def _check(
    report: Report,
    env: Environment,
    services: SystemServices,
    copies: StagedCopies,
    started: StartedApplication,
    checks: LiveChecks | None,
) -> None:
    if checks:
        _judge_counts(report, dict(checks.counting.result().rows), copies)
        check.report_results(report, checks.checking, "on the live database", strict=copies.strict, before=copies.rules)
    services.last = result = smoke_check.after(started.health)(env.application)
    report_smoke(report, result)
    if checks:
        check.render(report, env, after=services.last)


def _attach(services: SystemServices) -> Pending[Attached] | None:
    """Replicas follow and Sentinels monitor Redis again."""
    if services.topology is None or services.topology.is_alone:
        return None
    env = services.env
    return attach.bind(env.redis).submit(services.topology, env.reports_directory)


def _judge_counts(report: Report, live: dict[str, int], copies: StagedCopies) -> None:
    """Clients write again, so counts may be higher than in the copy."""
    fewer = [
        f"{name}: {live.get(name, 0):,} of {rows:,}" for name, rows in copies.rows.items() if live.get(name, 0) < rows
    ]
    report.prefer(
        "rows live",
        not fewer,
        "find out who deletes rows: the copy had all of them at the swap",
        value="; ".join(fewer[:3]) or f"{sum(live.values()):,} in {len(live)} tables",
    )


def report_results(
    report: Report, env: Environment, chosen: Chosen, services: SystemServices, gate: DatabaseGate
) -> None:
    """Compare with the RTO and RPO, and list the lost writes. `gate`: measured the database's loss."""
    judge_time(report, env)
    database.judge_data_loss(report, env, chosen.database, gate)
    report_lost_writes(report, env, chosen.database.manifest.taken, services)
    finish(report, chosen)


def judge_time(report: Report, env: Environment) -> None:
    """Compare the run's time with the RTO.

    Raises:
        RunbookFailed: something live is not as it must be.
    """
    report.fail_if_critical()
    report.prefer(
        "recovery time against the RTO",
        report.seconds <= env.rto_seconds,
        "check which step took longest",
        value=duration(report.seconds),
        expected=f"at most {duration(env.rto_seconds)}",
    )
    report.fact("RTO", f"{duration(report.seconds)} of {duration(env.rto_seconds)}")


def finish(report: Report, chosen: OtherParts) -> None:
    """Note the backups as verified, and the outcome."""
    report.measure("everything backup", sum(backup.manifest.bytes for backup in chosen.backups))
    for backup in chosen.backups:
        mark_verified(report, backup)
    report.outcome = "the system is up, and what was restored is proven"


def report_lost_writes(
    report: Report, env: Environment, moment: datetime, services: SystemServices, *, stored_are_kept: bool = False
) -> None:
    """Writes that the application acknowledged between `moment` and its stop, from its log. `stored_are_kept`: those
    whose resource is in the database are not lost: the application logs a write after its commit."""
    if not (env.has("logs") and env.logs.app):
        report.fact("writes lost", "not counted: [logs] app is not set")
        return
    try:
        writes = read_writes_since.after(services.last)(env.logs, moment, before=services.stopped_at)
        if stored_are_kept and writes.items:
            stored = find_stored(env.postgres, env.application, [item.resource for item in writes.items])
            writes = writes.without(stored)
    except OpsError as error:
        report.warn("writes lost", "compare with the clients' own records", value=f"not counted: {error.message}")
        return
    if not writes.complete:
        report.warn("writes lost", writes.note, value="not all were counted")
    what = "and missing in the database" if stored_are_kept else "after the backup"
    report.fact("writes lost", f"{writes.count:,} acknowledged {what}")
    report.table("Writes lost, by kind", ("request", f"acknowledged {what}"), writes.by_kind)
    more = writes.count - len(writes.items)
    which = f" (the first {len(writes.items):,}; {more:,} more are in the application's log)" if more else ""
    report.table(f"Writes lost, one by one{which}", ("time", "method", "path", "resource"), writes.items)
