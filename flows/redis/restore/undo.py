"""Undo of a Redis restore (§2.3)."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from blocks.environment import Environment
from flows.pinned import pin_redis
from flows.redis.backup import judge_kept, keep_live
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.methods import living_master
from flows.redis.restore.steps import judge_preconditions, plan_detaching, put_back, start_again
from runbook import clock
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.redis.restore.final_save import has_lost_directory, judge_final_save, read_last_state
from tasks.redis.restore.kept import KeptRedisData, prepare_kept, read_kept, verify_kept
from tasks.redis.restore.live import read_live
from tasks.redis.restore.login import judge_login
from tasks.redis.restore.place import judge_place, judge_stop
from tasks.redis.restore.restart import judge_restart
from tasks.redis.restore.swap import SwappedRedis, start_redis, stop_redis, superseded_redis
from tasks.redis.restore.undoing import (
    UNDO,
    end_undoing,
    find_undoing,
    loss_of_undo,
    note_started,
    swap_again,
    swap_back,
)
from tasks.redis.server import answers, connected, key_counts
from tasks.redis.topology.isolation import TAKE_OFF, note_swapped
from tasks.redis.topology.topology import read_topology


@flow(name="undo-restore-redis", flow_run_name=RunName("undo-restore-redis {environment} {kept}"))
def undo_restore_redis(environment: str, kept: str = "latest", plan: str = "", confirm: str = "") -> Report:
    """Redisのリストアの取り消し (§2.3)

    Restores the data that restore-redis or full-restore replaced. Run it if the restored data is wrong.

    The old data is loaded into a scratch server before anything stops. If the AOF was switched on or off since, the
    newest file is converted to the form that the server starts from now.

    What it changes: it detaches replicas and Sentinels, stops the service, exchanges the two directories by rename,
    starts the service, and reattaches replicas and Sentinels. Writes since the restore are kept in the replaced
    directory: without an AOF they are saved before the stop. The plan and the report state how many they are. If they
    can no longer be counted at the stop (the server has restarted since the plan), nothing is replaced. If the server
    does not start with the old data, the current data is restored. If the run is killed, run it again: it
    continues. Undo: run it again. Evidence: keys before and after.

    Args:
        environment: Environment (lab, staging, production …)
        kept: latest, or the name of a superseded directory (….superseded_YYYYMMDD_HHMMSS)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook(
        "Undo restore of Redis", env, confirm, plan, changes=True, rank="recovery", name="undo-restore-redis"
    ) as report:
        aside, judged = _choose(env, kept), read_live(env.redis)
        report.fact("put back", aside.name)
        report.pin("kept", aside.name)
        report.fact("keys before", _keys(env))
        kept_data = _judge(report, env, aside) if aside.exists() else None
        around = read_topology(env.redis, env.reports_directory)
        report.require(
            "Sentinels that are not listed",
            not around.unlisted,
            "name all of them in [redis] sentinels; SENTINEL RESET if one is lost for good",
            value=around.unlisted or "none",
        )
        judge_preconditions(
            report,
            (
                *judge_place(env.redis, 0, writes_configuration=not around.is_alone),
                *judge_stop(env.redis, env.services),
                *judge_login(env.redis, is_watched=bool(around.watchers), is_alone=around.is_alone),
                *judge_final_save(env.redis),
                *(judge_restart(env.redis) if answers(env.redis) else ()),
            ),
        )
        if found := living_master(env, around):
            judge_kept(report, env, found)
            report.plan("keep", f"the data of {found.address} as a backup: it is in no directory that is kept")
        plan_detaching(report, env, around)
        report.plan("stop", f"the service {env.services.name_of('redis')}", seconds=2, by=[stop_redis])
        report.plan("exchange", f"{aside} and {env.redis.data_directory}; both are kept", seconds=0.1, by=[swap_back])
        if kept_data and not kept_data.starts:
            form = "AOF" if kept_data.is_aof else "RDB"
            report.plan(
                "convert", f"its {form}, its newest data: the server now starts from the other form", by=[prepare_kept]
            )
        report.plan("start", "and wait until it has loaded the old data", seconds=2, by=[start_redis])
        path = env.redis.data_directory
        pin_redis(report, env.redis, replaced=True)
        what = f"Redis has the data of {aside.name} again, and its current data is kept"
        planned = _planned_loss(env, aside)
        effect = Effect(what, "run it again", (planned,), 4.0)
        permit = report.permit(Act(UNDO, str(aside)), Act(TAKE_OFF, path), effect=effect)
        _exchange(RedisGate(report, env, permit, around, judged), aside, kept_data, planned)
        report.fact("keys after", _keys(env))
        report.outcome = f"{aside.name} is live again"
    return report


def _planned_loss(env: Environment, aside: Path) -> Loss:
    last = None
    with contextlib.suppress(OpsError):
        last = None if has_lost_directory(env.redis) else read_last_state(env.redis)
    found = loss_of_undo(env.redis, aside, last, env.reports_directory)
    return found if found.since else replace(found, as_of=clock.now())


def _choose(env: Environment, kept: str) -> Path:
    undoing = find_undoing(env.redis, env.reports_directory)
    if undoing and kept in ("latest", undoing.aside.name):
        return undoing.aside
    found = superseded_redis(env.redis)
    chosen = found[-1:] if kept == "latest" else [path for path in found if path.name == kept]
    if not chosen:
        names = ", ".join(path.name for path in found) or "none"
        what = "there is no data" if kept == "latest" else f"there is no {kept[:80]}"
        raise OpsError(f"{what} that a restore of Redis replaced", f"choose one of: {names}")
    return chosen[0]


def _judge(report: Report, env: Environment, aside: Path) -> KeptRedisData:
    """Load the old data before anything stops.

    Raises:
        RunbookFailed: it cannot be loaded.
    """
    try:
        found = read_kept(env.redis, aside)
    except OpsError as error:
        report.fail(f"{aside.name} loads", error.hint, value=error.message, expected="data")
        report.fail_if_critical()
        raise
    report.passed(f"{aside.name} loads", value=f"{found.keys:,} keys from its {'AOF' if found.is_aof else 'RDB'}")
    return found


def _exchange(gate: RedisGate, aside: Path, data: KeptRedisData | None, planned: Loss) -> None:
    report, env, permit = gate.report, gate.env, gate.permit
    data = prepare_kept(permit, env.redis, data) if data else None
    swapped = None
    report.state_is("Redis may be stopped; no data was deleted", "run it again: it continues from here")
    try:
        if found := living_master(env, gate.around):
            kept = keep_live(report, env, found).name
            report.fact(f"undo for the data of {found.address}", f"restore-redis with backup={kept}")
        gate.fence()
        last = gate.stopped.last if gate.stopped else None
        loss = loss_of_undo(env.redis, aside, last, env.reports_directory, planned)
        swapped = swap_back.after(gate.judge(loss))(permit, env.redis, aside, env.reports_directory)
        started = start_redis.after(swapped)(env.redis, env.services)
        if data:
            verify_kept.after(started)(env.redis, data)
    except BaseException as error:
        is_back = _go_back(gate, swapped, aside)
        if swapped is None or not isinstance(error, OpsError):
            raise
        state = "the current data is live" if is_back else "fix the finding below: the current data is not live either"
        raise OpsError(f"the server does not serve {aside.name}: {error.message}", state) from None
    taken = note_swapped(env.reports_directory, gate.around)
    report.loses(loss)
    note_started(env.redis, env.reports_directory, swapped.kept)
    report.fact("replaced data", swapped.kept or "none")
    put_back(report, env, permit, taken, after=swapped)
    end_undoing(env.reports_directory)


def _go_back(gate: RedisGate, swapped: SwappedRedis | None, aside: Path) -> bool:
    """Restore the data that was live, with replicas and Sentinels; returns whether that succeeded. The permit covers
    it, because it restores the earlier state."""
    report, env = gate.report, gate.env
    try:
        if swapped:
            stop_redis(env.redis, env.services)
            swap_again(swapped, aside)
            end_undoing(env.reports_directory)
        was_running = gate.was_running or swapped is not None
        return start_again(report, env, gate.permit, gate.around, was_running=was_running)
    except OpsError as second:  # report the first error first
        report.fail("the current data is live again", second.hint, value=second.message)
        return False


def _keys(env: Environment) -> str:
    try:
        with connected(env.redis) as client:
            return f"{sum(keys for keys, _ in key_counts(client).values()):,}"
    except OpsError as error:
        return f"not measured: {error.message}"
