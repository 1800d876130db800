"""Undo of a Redis restore (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.pinned import pin_redis
from flows.redis.backup import judge_kept
from flows.redis.restore.gate import RedisGate
from flows.redis.restore.replacement import RedisFence, attaching, fencing, judge_kept_server
from flows.redis.restore.steps import UNTOUCHED, judge_preconditions, judge_stoppable, keeping, living_master
from runbook import clock
from runbook.change import Carrier, Change, Line, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.redis.restore.final_save import has_lost_directory, read_last_state
from tasks.redis.restore.kept import KeptRedisData, prepare_kept, read_kept, verify_kept
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.login import judge_login
from tasks.redis.restore.place import judge_place
from tasks.redis.restore.restart import judge_restart
from tasks.redis.restore.swap import SwappedRedis, start_redis, stop_redis, superseded_redis
from tasks.redis.restore.undoing import (
    end_undoing,
    find_undoing,
    loss_of_undo,
    note_started,
    swap_again,
    swap_back,
)
from tasks.redis.server import answers, connected, key_counts
from tasks.redis.topology.isolation import note_swapped
from tasks.redis.topology.topology import ReplicationTopology, read_topology

STATE = State("Redis may be stopped; no data was deleted", "run it again: it continues from here")


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
        data = _judge(report, env, aside) if aside.exists() else None
        undo = _plan(report, env, aside, data, judged)
        what = f"Redis has the data of {aside.name} again, and its current data is kept"
        effect = Effect(what, "run it again", (undo.exchange.planned,), 4.0)
        pins = [lambda report: pin_redis(report, env.redis, replaced=True)]
        with undo.exchange.explained(), carrying_out(report, *undo.lines, effect=effect, pins=pins) as carry:
            undo.carry_out(carry)
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


@dataclass
class DirectoryExchange:
    """The live data and the data in `aside` are exchanged; if the server does not serve it, they are exchanged again.
    `planned`: the loss. `swapped`: the directories, once they are exchanged; `is_started`, `is_back`: what followed."""

    gate: RedisGate
    aside: Path
    planned: Loss
    swapped: SwappedRedis | None = None
    is_started: bool = False
    is_back: bool = False

    def go_back(self) -> None:
        """Exchange the directories again, if they were. `RedisFence` starts the server then.

        Raises:
            OpsError: the server does not stop, or a rename failed.
        """
        env = self.gate.env
        if self.swapped:
            self.gate.was_running = False  # until then, nothing may start
            stop_redis(env.redis, env.services)
            swap_again(self.swapped, self.aside)
            end_undoing(env.reports_directory)
            self.gate.was_running = self.is_back = True

    def start(self, data: KeptRedisData | None) -> None:
        """Start the server, and verify the old data. None: it was not loaded before.

        Raises:
            OpsError: the server does not serve it.
        """
        env = self.gate.env
        started = start_redis.after(self.swapped)(env.redis, env.services)
        if data:
            verify_kept.after(started)(env.redis, data)
        self.is_started = True

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """State which data is live if the server does not serve the old data: by then the run has gone back."""
        try:
            yield
        except OpsError as error:
            if self.swapped is None or self.is_started:
                raise
            is_live = self.is_back and answers(self.gate.env.redis)
            state = (
                "the current data is live" if is_live else "fix the finding below: the current data is not live either"
            )
            raise OpsError(f"the server does not serve {self.aside.name}: {error.message}", state) from None


@dataclass(frozen=True)
class RedisUndo:
    """A replaced data directory becomes live again. `data`: in it; None: a killed run has exchanged it already.
    `other`: the server whose data no directory keeps: it is backed up first."""

    exchange: DirectoryExchange
    data: KeptRedisData | None
    other: Redis | None
    converting: Change[[], KeptRedisData] | None
    keeping: Change[[], str] | None
    fence: RedisFence
    exchanging: Change[[], tuple[SwappedRedis, Loss]]
    starting: Change[[KeptRedisData | None], None]
    attaching: Change[[ReplicationTopology, None], None] | None

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        before = [one for one in (self.converting, self.keeping) if one]
        after = [self.attaching] if self.attaching else []
        return [*before, *self.fence.lines, self.exchanging, self.starting, *after]

    def carry_out(self, carry: Carrier) -> None:
        """Convert the old data, stop, pass the gate, exchange the directories, start, verify, reattach.

        Raises:
            LossExceeded: the live side is another one now, or more would be lost than was confirmed. Nothing was
                replaced.
            OpsError: a step failed.
        """
        gate = self.exchange.gate
        report, env = gate.report, gate.env
        data = carry(self.converting) if self.converting else self.data
        if self.keeping and self.other:
            kept = carry(self.keeping)
            report.fact(f"undo for the data of {self.other.address}", f"restore-redis with backup={kept}")
        self.fence.carry_out(carry)
        swapped, loss = carry(self.exchanging)
        carry(self.starting, data)
        taken = note_swapped(env.reports_directory, gate.around)
        report.loses(loss)
        note_started(env.redis, env.reports_directory, swapped.kept)
        report.fact("replaced data", swapped.kept or "none")
        if self.attaching:
            carry(self.attaching, taken, None)
        end_undoing(env.reports_directory)


def _plan(report: Report, env: Environment, aside: Path, data: KeptRedisData | None, judged: LiveRedis) -> RedisUndo:
    """Judge and plan the undo.

    Raises:
        OpsError: a server refuses.
    """
    around = read_topology(env.redis, env.reports_directory)
    _judge_conditions(report, env, around)
    if other := living_master(env, around):
        judge_kept(report, env, other)
    exchange = DirectoryExchange(RedisGate(report, env, around, judged), aside, _planned_loss(env, aside))
    needs = [
        partial(judge_stoppable, env=env, is_up=True),
        partial(judge_kept_server, env=env, around=around, kept=other),
    ]
    return RedisUndo(
        *(exchange, data, other),
        _converting(env, data) if data and not data.starts else None,
        keeping(report, env, other) if other else None,
        fencing(exchange.gate, f"the service {env.services.name_of('redis')}", STATE, needs),
        _exchanging(exchange),
        Change(exchange.start, "start", "and wait until it has loaded the old data", seconds=2, is_final=True),
        attaching(report, env, around, lambda _: STATE),
    )


def _judge_conditions(report: Report, env: Environment, around: ReplicationTopology) -> None:
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
            *judge_login(env.redis, is_watched=bool(around.watchers), is_alone=around.is_alone),
            *(judge_restart(env.redis) if answers(env.redis) else ()),
        ),
    )


def _converting(env: Environment, data: KeptRedisData) -> Change[[], KeptRedisData]:
    form = "AOF" if data.is_aof else "RDB"
    return Change(
        prepare_kept.bind(env.redis, data),
        "convert",
        f"its {form}, its newest data: the server now starts from the other form",
        begun=UNTOUCHED,
    )


def _exchanging(exchange: DirectoryExchange) -> Change[[], tuple[SwappedRedis, Loss]]:
    gate, env, aside = exchange.gate, exchange.gate.env, exchange.aside
    action = swap_back.bind(env.redis, aside, env.reports_directory)

    def swap() -> tuple[SwappedRedis, Loss]:
        last = gate.stopped.last if gate.stopped else None
        loss = loss_of_undo(env.redis, aside, last, env.reports_directory, exchange.planned)
        gate.judge(loss)
        exchange.swapped = swapped = action()
        return swapped, loss

    return Change(
        swap,
        "exchange",
        f"{aside} and {env.redis.data_directory}; both are kept",
        seconds=0.1,
        by=[action],
        begun=STATE,
        reverse=exchange.go_back,
    )


def _keys(env: Environment) -> str:
    try:
        with connected(env.redis) as client:
            return f"{sum(keys for keys, _ in key_counts(client).values()):,}"
    except OpsError as error:
        return f"not measured: {error.message}"
