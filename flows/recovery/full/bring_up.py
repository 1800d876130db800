"""Second and third phase of a full restore: the swap of all three, the start, and the checks on what is live."""

from __future__ import annotations

from datetime import UTC, datetime

from blocks.environment import Environment
from blocks.postgres.server import Connection
from flows.application.health_checks import report_health, report_smoke
from flows.database import expectations as check
from flows.database import restore_steps as database
from flows.recovery.full.build import Beside, Copies
from flows.recovery.full.choose import Chosen
from flows.recovery.full.stopped_services import Held
from flows.store import mark_verified
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import Pending
from runbook.report import Report
from runbook.units import duration
from tasks.application.connection_string import switch_target
from tasks.application.health import Health, SmokeResult, smoke_check, wait_healthy
from tasks.application.staged_files import swap_files
from tasks.host.services import start_services
from tasks.logs.figures.writes import read_writes_since
from tasks.postgres.content.content import read_counts
from tasks.postgres.restore.swap import SwapUnknown, swap_databases
from tasks.postgres.server.server import Identity
from tasks.redis.restore.swap import prepare_empty, start_redis, swap_redis, verify_live_redis
from tasks.redis.topology.isolation import attach, note_swapped

HEALTH_SECONDS = 120


def swap(
    report: Report,
    permit: Permit,
    env: Environment,
    guard: Connection,
    held: Held,
    copies: Copies,
    live: Identity,
    chosen: Chosen,
    *,
    advance: bool,
) -> None:
    """All three, one after the other: each by rename, each checked to be what was judged."""
    held.stop()
    left = others_in(copies)
    name = chosen.database.name
    try:
        done = swap_databases.after(held.last, copies.login)(
            permit, env.postgres, guard, copies.database, live.oid, name
        )
    except SwapUnknown:
        held.may_have_swapped("database", left)
        raise
    held.last = done
    held.undo = (
        f"undo-restore with kept={done.kept} brings the replaced database back"
        if done.kept
        else "There is nothing to undo: no database had the live name before"
    )
    held.has_swapped("database", done.kept, left)
    swap_others(report, permit, env, held, copies)
    database.advance(report, permit, env, done.kept, wanted=advance)
    report.fact("database swapped in", f"{done.outage_seconds:.2f} s")
    report.fact("kept aside", ", ".join(held.kept) or "nothing: there was nothing left")


def others_in(copies: Beside) -> list[str]:
    """For people: what there is besides the database."""
    return [*(["Redis"] if copies.redis else []), *(["files"] if copies.files else [])]


def swap_others(report: Report, permit: Permit, env: Environment, held: Held, copies: Beside) -> None:
    """Redis and the files, where there are copies of them."""
    left = others_in(copies)
    if copies.redis:
        held.last = redis = swap_redis.after(held.last)(permit, env.redis, copies.redis)
        held.around = note_swapped(env.reports_directory, held.around) if held.around else None
        held.has_swapped("Redis", redis.kept, left := left[1:])
    if copies.files:
        held.last = files = swap_files.after(held.last)(permit, env.application, copies.files)
        held.has_swapped("files", files.kept, left[1:])
        _switch(report, permit, env, held)


def _switch(report: Report, permit: Permit, env: Environment, held: Held) -> None:
    """The files came back with the connection string of their time: a failover may have been since."""
    if not env.application.env_file:
        return
    try:
        held.last = done = switch_target.after(held.last)(permit, env.application, env.postgres)
    except OpsError as error:
        report.warn("connection string of the application", error.hint, value=error.message)
    else:
        if done.changed:
            report.fact("connection string of the application", f"{done.before} → {done.after}")


def start(report: Report, env: Environment, copies: Beside, held: Held) -> None:
    """Start in order of dependency, then check what is live: health, Redis, row counts, expectations, the application.

    Raises:
        OpsError: the backend does not become healthy.
    """
    if copies.redis is None and env.has("redis") and (done := prepare_empty(env.redis)):
        report.warn("Redis data directory", "look at what is in it; take backups of Redis too", value=done)
    checking = check.start(report, env, env.postgres.database, after=held.last, origin=copies.origin)
    counting = read_counts.after(held.last).submit(env.postgres, env.postgres.database)
    started: object = start_services.after(held.last)(env.services, env.services_in((env.postgres.service,)))
    if env.has("redis"):
        started = start_redis.after(started)(env.redis, env.services)
    problems = verify_live_redis.after(started)(env.redis, copies.redis) if copies.redis else ()
    putting = _put_back(held, started) if not problems else None  # the backend finds its master through the Sentinels
    started = start_services.after(started)(env.services, env.services_in(("backend", "frontend")))
    health = wait_healthy.after(started)(env.application, seconds=HEALTH_SECONDS, services=env.services)
    for problem in putting.result() if putting else ():
        report.warn("not put back", problem)
    report_health(report, health)
    if held.stopping_at:
        outage = (datetime.now(UTC) - held.stopping_at).total_seconds()
        report.fact("services out of order for", f"{duration(outage)}, from their stop until healthy")
    if copies.redis:
        report.require(
            "Redis live",
            not problems,
            "look at its log; what it replaced is kept aside",
            value="; ".join(problems[:3]) or "every key without TTL is there",
        )
    _tell_counts(report, dict(counting.result().rows), copies)
    check.report_results(report, checking, "on the live database", strict=copies.strict, before=copies.rules)
    held.last = _smoke(report, env, health)


def _put_back(held: Held, after: object) -> Pending[tuple[str, ...]] | None:
    """Replicas follow, and the Sentinels watch again, while the application starts."""
    if held.around is None or held.around.is_alone:
        return None
    env = held.env
    return attach.after(after).submit(held.permit, env.redis, held.around, env.reports_directory)


def _tell_counts(report: Report, live: dict[str, int], copies: Beside) -> None:
    """Clients write again, so counts may have grown."""
    fewer = [
        f"{name}: {live.get(name, 0):,} of {rows:,}" for name, rows in copies.rows.items() if live.get(name, 0) < rows
    ]
    report.require(
        "rows live",
        not fewer,
        "find out who deletes: the copy had them all when it took the live name",
        value="; ".join(fewer[:3]) or f"{sum(live.values()):,} in {len(live)} tables",
    )


def _smoke(report: Report, env: Environment, health: Health) -> SmokeResult:
    result = smoke_check.after(health)(env.application)
    report_smoke(report, result)
    return result


def report_results(report: Report, env: Environment, chosen: Chosen, held: Held) -> None:
    """RTO, RPO, and the writes that are lost, named."""
    report.fail_if_critical()
    report.prefer(
        "recovery time against the RTO",
        report.seconds <= env.rto_seconds,
        "see which step took long",
        value=duration(report.seconds),
        expected=f"at most {duration(env.rto_seconds)}",
    )
    report.fact("RTO", f"{duration(report.seconds)} of {duration(env.rto_seconds)}")
    database.judge_data_loss(report, env, chosen.database)
    tell_lost(report, env, chosen, held)
    backups = [backup for backup in (chosen.database, chosen.redis, chosen.files) if backup]
    report.measure("everything backup", sum(backup.manifest.bytes for backup in backups))
    for backup in backups:
        mark_verified(report, backup)
    report.outcome = "the system is up, and everything is restored and proven"


def tell_lost(report: Report, env: Environment, chosen: Chosen, held: Held) -> None:
    """Writes that the application acknowledged after the snapshot and before it was stopped, from its log."""
    if not (env.has("logs") and env.logs.app):
        report.fact("writes lost", "not counted: [logs] app is not configured")
        return
    try:
        writes = read_writes_since.after(held.last)(env.logs, chosen.database.manifest.taken, before=held.stopped_at)
    except OpsError as error:
        report.warn("writes lost", "ask the application's clients", value=f"not measured: {error.message}")
        return
    if not writes.complete:
        report.warn("writes lost", writes.note, value="not measured")
    report.fact("writes lost", f"{writes.count:,} acknowledged after the backup")
    report.table("Writes lost, by kind", ("request", "acknowledged after the backup"), writes.by_kind)
    more = writes.count - len(writes.items)
    which = f" (the first {len(writes.items):,}; {more:,} more are in the application's log)" if more else ""
    report.table(f"Writes lost, one by one{which}", ("time", "method", "path", "resource"), writes.items)
