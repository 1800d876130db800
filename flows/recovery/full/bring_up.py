"""The second and third phase of a full restore: swap the database, Redis and files; start the services; check them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from blocks.environment import STOP_ORDER, Environment
from blocks.postgres.server import Connection
from flows.application.files_gate import changes_since, measured_loss, pass_files
from flows.application.health_checks import report_health, report_smoke
from flows.database import expectations as check
from flows.database import restore_steps as database
from flows.database.gate import DatabaseGate
from flows.database.staged_restore import report_sequences
from flows.recovery.full.build import StagedCopies, SystemCopies
from flows.recovery.full.choose import Chosen, OtherParts, other_master
from flows.recovery.full.database_server import FoundServer
from flows.recovery.point.swap import takes_writes
from flows.recovery.stopped_services import SystemServices
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.sources import judge_kept_master
from flows.redis.restore.sources import loss_of as redis_loss
from flows.redis.restore.steps import report_not_attached
from flows.store import mark_verified
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import Pending, permitted_by
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration
from tasks.application.connection_string import switch_target
from tasks.application.files import directory_of
from tasks.application.health import Health, SmokeResult, answers, smoke_check, wait_healthy
from tasks.application.staged_files import swap_files
from tasks.application.stored import find_stored
from tasks.host.services import start_services
from tasks.logs.figures.writes import read_writes_since
from tasks.postgres.content.content import read_counts
from tasks.postgres.restore.swap import SwapUnknown, swap_databases
from tasks.postgres.server.server import Identity
from tasks.redis.restore.live import LiveRedis
from tasks.redis.restore.swap import prepare_empty, start_redis, swap_redis, verify_live_redis
from tasks.redis.restore.undoing import note_started
from tasks.redis.topology.isolation import Attached, attach, note_swapped, wait_for_followers

HEALTH_SECONDS = 120


def system_services(
    report: Report, permit: Permit, env: Environment, chosen: OtherParts, found: FoundServer, last: object
) -> SystemServices:
    """The services of the run, with those that it found running."""
    report.state_is(
        "nothing live was replaced; services are as they were found", "fix the findings above, then run this again"
    )
    running = [role for role in STOP_ORDER if role in found.services.wanted]
    topology, live = chosen.redis_topology, chosen.redis_live
    return SystemServices(
        *(report, env, running, last),
        permit=permit,
        topology=topology,
        redis_kept=chosen.redis_kept,
        stops_redis=env.has("redis") and chosen.stops_redis,
        other_master=other_master(env, chosen),
        redis_gate=RedisGate(report, env, topology, live) if topology and live else None,
    )


def swap(
    report: Report,
    permit: Permit,
    env: Environment,
    guard: Connection,
    services: SystemServices,
    copies: SystemCopies,
    live: Identity,
    chosen: Chosen,
    *,
    advance: bool,
    gate: DatabaseGate,
) -> None:
    """Swap all three by rename, one after the other. `gate`: measures what the database loses.

    Raises:
        LossExceeded: more than was confirmed. Nothing live was replaced.
        OpsError: a live part is not the one that was judged.
    """
    gate.look_ahead()
    services.stop()
    services.stop_redis()
    pass_others(report, env, services, copies, chosen)
    left = others_in(copies)
    name = chosen.database.name
    try:
        with permitted_by(permit):
            done = swap_databases.bind(env.postgres, live.oid, name, gate.judge)(guard, copies.database)
    except SwapUnknown:
        services.may_have_swapped("database", left)
        raise
    services.last = done
    services.has_swapped("database", done.kept, left, Next("undo-restore", "", {"kept": done.kept}))
    report.loses(gate.measured)
    swap_others(report, permit, env, services, copies, chosen)
    with permitted_by(permit):
        report_sequences(report, env, done.kept, advance=advance)
    report.fact("database swapped in", f"{done.outage_seconds:.2f} s")
    report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")


def others_in(copies: StagedCopies) -> list[str]:
    """The names of the parts other than the database."""
    return [*(["Redis"] if copies.redis else []), *(["files"] if copies.files else [])]


def pass_others(
    report: Report, env: Environment, services: SystemServices, copies: StagedCopies, chosen: OtherParts
) -> None:
    """Pass the gates of Redis and the files, before the first part is replaced. The services are stopped.

    Raises:
        LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
    """
    if copies.redis:
        services.last = _pass_redis(services, chosen)
    if copies.files and chosen.files:
        pass_files(report, env, directory_of(env.application), changes_since(chosen.files))


def _pass_redis(services: SystemServices, chosen: OtherParts) -> LiveRedis:
    assert services.redis_gate
    backup = None if chosen.redis_survivor else chosen.redis
    return services.redis_gate.judge(redis_loss(chosen.redis_survivor or backup), backup)


def swap_others(
    report: Report,
    permit: Permit,
    env: Environment,
    services: SystemServices,
    copies: StagedCopies,
    chosen: OtherParts,
) -> None:
    """Swap Redis and the files, where copies of them were built. Each passes its gate again: the swap of the database
    took time.

    Raises:
        LossExceeded: a part was written to meanwhile, and is not replaced.
    """
    left = others_in(copies)
    if copies.redis:
        _pass_redis(services, chosen)
        with permitted_by(permit):
            services.last = redis = swap_redis.bind(env.redis, copies.redis)()
        services.topology = note_swapped(env.reports_directory, services.topology) if services.topology else None
        services.redis_replaced = redis.kept
        services.has_swapped("Redis", redis.kept, left := left[1:], _directory("undo-restore-redis", redis.kept))
        report.loses(redis_loss(chosen.redis_survivor or chosen.redis))
    if copies.files and chosen.files:
        changes = changes_since(chosen.files)
        pass_files(report, env, directory_of(env.application), changes)
        services.last = files = swap_files.after(services.last)(permit, env.application, copies.files)
        services.has_swapped("files", files.kept, left[1:], _directory("undo-restore-files", files.kept))
        report.loses(measured_loss(report, files.kept, changes))
        _switch(report, permit, env, services)


def _directory(undo: str, kept: Path | None) -> Next | None:
    return Next(undo, "", {"kept": kept.name}) if kept else None


def _switch(report: Report, permit: Permit, env: Environment, services: SystemServices) -> None:
    """The restored files have the connection string of their time; a failover may have happened since."""
    if not (env.application.env_file and env.has("postgres")):
        return
    try:
        with permitted_by(permit, after=services.last):
            services.last = done = switch_target.bind(env.application, env.postgres)()
    except OpsError as error:
        report.warn("connection string of the application", error.hint, value=error.message)
    else:
        if done.changed:
            report.fact("connection string of the application", f"{done.before} → {done.after}")


def start(report: Report, env: Environment, copies: StagedCopies, services: SystemServices) -> None:
    """Start the services, then check the health, Redis, row counts, expectations and the application.

    Raises:
        OpsError: the backend does not become healthy.
    """
    prepare_redis(report, env, copies, services)
    live = env.postgres.database
    unjudged = copies.states is None
    whole = check.start(report, env, live, after=services.last, origin=copies.origin) if unjudged else None
    counting = read_counts.after(services.last).submit(env.postgres, live)
    database_started = start_services.after(services.last)(
        env.services, env.services_in((env.postgres.service,)), answers=lambda _: takes_writes(env)
    )
    started = start_application(env, copies, services, after=database_started)
    # Of rules that a copy kept, only the application's writes since can have broken one.
    checking = whole or check.start(report, env, live, after=started.health, origin=copies.origin, since=copies.states)
    report_started(report, env, copies, services, started)
    _judge_counts(report, dict(counting.result().rows), copies)
    check.report_results(report, checking, "on the live database", strict=copies.strict, before=copies.rules)
    services.last = report_application(report, env, started)
    check.render(report, env, after=services.last)
    report_attached(report, env, services, started)


@dataclass(frozen=True)
class StartedApplication:
    """The application runs. `problems`: how the live Redis differs from its copy. `attaching`: the replicas and
    Sentinels of Redis."""

    health: Health
    problems: Sequence[str]
    attaching: Pending[Attached] | None


def prepare_redis(report: Report, env: Environment, copies: StagedCopies, services: SystemServices) -> None:
    """Give Redis a data directory, if it starts without a restored copy and has none."""
    if copies.redis is None and services.stops_redis and (done := prepare_empty(env.redis)):
        report.warn("Redis data directory", "check its content, and back up Redis too", value=done)


def start_application(
    env: Environment, copies: StagedCopies, services: SystemServices, after: object
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


def report_started(
    report: Report, env: Environment, copies: StagedCopies, services: SystemServices, started: StartedApplication
) -> None:
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
    if services.redis_kept:
        judge_kept_master(report, env, services.redis_kept, after=started.health)
    if services.undo:
        report.undo_is(*services.undo)
    else:
        report.fact("undo", "none: there was no live data, so nothing is kept")


def report_application(report: Report, env: Environment, started: StartedApplication) -> SmokeResult:
    """Run the smoke checks."""
    result = smoke_check.after(started.health)(env.application)
    report_smoke(report, result)
    return result


def report_attached(report: Report, env: Environment, services: SystemServices, started: StartedApplication) -> None:
    """Wait until the replicas of Redis are in sync, and report the servers and Sentinels that are not attached."""
    if started.attaching:
        attached = started.attaching.result()
        with permitted_by(services.permit):
            waiting = wait_for_followers.bind(env.redis, attached, env.reports_directory)()
        report_not_attached(report, waiting)


def _attach(services: SystemServices) -> Pending[Attached] | None:
    """Replicas follow and Sentinels monitor Redis again."""
    if services.topology is None or services.topology.is_alone:
        return None
    env = services.env
    with permitted_by(services.permit):
        return attach.bind(env.redis, services.topology, env.reports_directory).submit()


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
