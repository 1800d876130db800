"""A full restore of an environment without PostgreSQL: Redis, the application's files, or both (§8.2)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from blocks.environment import START_ORDER, Environment, Stores
from flows.application.files_gate import FilesSource
from flows.recovery.full import bring_up, build, choose
from flows.recovery.full.choose import OtherParts
from flows.recovery.full.database_server import FoundServer, judge_roles, redis_role
from flows.recovery.stopped_services import SystemServices, started_on_failure
from flows.redis.restore.sources import RedisSource, remembered
from flows.redis.restore.steps import plan_detaching
from flows.store import store_for
from runbook import clock
from runbook.errors import OpsError
from runbook.guard.effect import Effect, back_to, seconds_from
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.application.staged_files import swap_files
from tasks.backups.catalogue import LATEST, find_backup, kind_of
from tasks.backups.manifest import Kind
from tasks.host.services import read_services
from tasks.redis.restore.swap import swap_redis


def restore(
    report: Report,
    env: Environment,
    wanted: str,
    source: Stores,
    without: Sequence[choose.Part],
    redis_source: RedisSource,
    files_source: FilesSource,
    stop_services: str,
) -> None:
    """Plan, build and prove staged copies, swap them, and start the services.

    Raises:
        OpsError: there is no such backup, or a service does not start.
        RunbookFailed: a copy differs from its backup; nothing live was replaced.
    """
    moment = _moment(env, wanted, source)
    chosen = choose.choose_others(
        report, env, moment, source, without, redis_source, files_source, latest=wanted == LATEST
    )
    states = read_services(env.services, env.services_in(START_ORDER))
    running = ", ".join(role for role, runs in states.running.items() if runs) or "none"
    report.fact("services found running", running)
    judge_roles(report, env, *redis_role(env))
    if not (chosen.backups or chosen.redis_survivor):
        report.fail_if_critical()
        report.outcome = _nothing(env, chosen)
        return
    _plan(report, env, chosen, stop_services)
    choose.pin_others(report, env, chosen)
    permit = report.permit(*chosen.acts(env), effect=_effect(report, chosen))
    report.fail_if_critical()
    services = bring_up.system_services(report, permit, env, chosen, FoundServer("absent", states, None), permit)
    _carry_out(report, permit, env, chosen, services, stop_services)


def _moment(env: Environment, wanted: str, source: Stores) -> datetime:
    """The point in time to restore: that of the wanted backup of Redis or the files."""
    if wanted == LATEST:
        return clock.now()
    has_files = env.has("application") and bool(env.application.directory)
    parts: dict[Kind, bool] = {"redis": env.has("redis"), "files": has_files}
    kinds = [kind for kind, has in parts.items() if has]
    kind = kind_of(wanted, kinds[0]) if kinds else None
    if kind is None or kind not in kinds:
        known = " and ".join(kinds) or "nothing"
        raise OpsError(f"{wanted[:80]} is no backup of a part of {env.name}", f"it has {known}, and no database")
    return find_backup(store_for(env, kind, source), kind, wanted, env.name).manifest.taken


def _nothing(env: Environment, chosen: OtherParts) -> str:
    if chosen.redis_kept:
        return f"nothing to restore: Redis at {chosen.redis_kept.where} serves its data, and there is no other part"
    return f"nothing to restore: there is no backup of a part of {env.name}"


def _plan(report: Report, env: Environment, chosen: OtherParts, when: str) -> None:
    first = when == "first" or bool(chosen.redis_survivor)
    if first:
        build.plan_stop(report, env)
    build.plan_others(report, env, chosen)
    if chosen.redis_topology:
        plan_detaching(report, env, chosen.redis_topology)
    if not first:
        build.plan_stop(report, env)
    build.plan_redis_stop(report, env, chosen)
    live = [env.redis.data_directory] if chosen.redis or chosen.redis_survivor else []
    live += [env.application.directory] if chosen.files else []
    kept = f"{', '.join(live)}: the old data is kept next to it as .superseded_…"
    report.plan("swap", kept, seconds=0.1, by=[swap_redis, swap_files])
    build.plan_start(report, env, chosen)


def _effect(report: Report, chosen: OtherParts) -> Effect:
    what = [
        back_to("Redis", chosen.redis.manifest.taken) if chosen.redis else "",
        f"Redis has the data of {chosen.redis_survivor.name}" if chosen.redis_survivor else "",
        f"the files go back to {clock.short(chosen.files.manifest.taken)}" if chosen.files else "",
    ]
    down = seconds_from(report.plan_steps, "stop services")
    return Effect(
        ", ".join(filter(None, what)), ", ".join(choose.undo_of_others(chosen)), choose.losses_of_others(chosen), down
    )


def _carry_out(
    report: Report, permit: Permit, env: Environment, chosen: OtherParts, services: SystemServices, when: str
) -> None:
    survivor = chosen.redis_survivor
    with remembered(env, survivor or chosen.redis_kept, services.swapped), started_on_failure(services):
        if when == "first" or survivor:
            services.stop()
        if survivor:
            services.stop_redis()
        chosen = choose.captured(report, permit, env, chosen, services.redis_live)
        copies = build.build_others(permit, env, chosen)
        build.prove_others(report, env, chosen, copies)
        services.stop()
        services.stop_redis()
        bring_up.swap_others(report, permit, env, services, copies, chosen)
        report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")
    bring_up.prepare_redis(report, env, copies, services)
    started = bring_up.start_application(env, copies, services, after=services.last)
    bring_up.report_started(report, env, copies, services, started)
    services.last = bring_up.report_application(report, env, started)
    bring_up.report_attached(report, env, services, started)
    bring_up.judge_time(report, env)
    moment = min(backup.manifest.taken for backup in chosen.backups)
    bring_up.report_lost_writes(report, env, moment, services)
    bring_up.finish(report, chosen)
