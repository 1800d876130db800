"""A full restore of an environment without PostgreSQL: Redis, the application's files, or both (§8.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from blocks.environment import START_ORDER, Environment, Stores
from flows.application.files_gate import FilesSource
from flows.recovery.full import bring_up, choose
from flows.recovery.full.choose import OtherParts
from flows.recovery.full.database_server import judge_roles, redis_role
from flows.recovery.full.parts import UNTOUCHED, PartLines, prove_others
from flows.recovery.stopped_services import SystemServices, plan_stop
from flows.redis.restore.sources import RedisSource, remembered
from flows.store import store_for
from runbook import clock
from runbook.change import Carrier, Change, Line, carrying_out
from runbook.errors import OpsError
from runbook.guard.effect import Effect, back_to
from runbook.report import Report
from tasks.backups.catalogue import LATEST, find_backup, kind_of
from tasks.backups.manifest import Kind
from tasks.host.services import ServiceStates, read_services


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
    first = stop_services == "first" or bool(chosen.redis_survivor)
    planned = OthersRestore.plan(report, env, chosen, states, first=first)
    pins = [lambda report: choose.pin_others(report, env, chosen)]
    with carrying_out(report, *planned.lines, effect=_effect(chosen, planned.lines), pins=pins) as carry:
        planned.carry_out(carry)


@dataclass(frozen=True)
class OthersRestore:
    """The lines of a restore of Redis and the files. `first`: the services stop before the copies are built."""

    report: Report
    env: Environment
    chosen: OtherParts
    services: SystemServices
    first: bool
    stop: Change[[], None]
    parts: PartLines
    start: bring_up.SystemStart

    @classmethod
    def plan(
        cls, report: Report, env: Environment, chosen: OtherParts, states: ServiceStates, *, first: bool
    ) -> OthersRestore:
        """Plan the lines."""
        services = bring_up.system_services(report, env, chosen, states)
        return cls(
            *(report, env, chosen, services, first),
            plan_stop(services, services.stop, services.roles, seconds=2, begun=UNTOUCHED),
            PartLines.plan(report, env, chosen, services),
            bring_up.SystemStart.plan(report, env, chosen, services),
        )

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        parts, stop = self.parts, [self.stop]
        early = [*stop, *parts.early] if self.first else []
        late = [*([] if self.first else stop), *parts.late]
        return [*early, *parts.builds, *late, *parts.swaps, *self.start.lines]

    def carry_out(self, carry: Carrier) -> None:
        """Build and prove the copies, swap them in, and start the services.

        Raises:
            LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
            RunbookFailed, OpsError: a copy fails its proof, or a service does not start.
        """
        report, env, chosen, services = self.report, self.env, self.chosen, self.services
        with remembered(env, chosen.redis_survivor or chosen.redis_kept, services.swapped):
            if self.first:
                carry(self.stop)
            chosen = self.parts.capture(carry, chosen)
            wait = self.parts.begin(carry, chosen)
            copies = wait()
            prove_others(report, env, chosen, copies)
            if not self.first:
                carry(self.stop)
            self.parts.stop_late(carry)
            self.parts.swap(carry, copies, chosen)
            report.fact("replaced data kept", ", ".join(services.kept) or "none: there was no live data")
        self.start.carry_out(carry, copies)
        bring_up.judge_time(report, env)
        moment = min(backup.manifest.taken for backup in chosen.backups)
        bring_up.report_lost_writes(report, env, moment, services)
        bring_up.finish(report, chosen)


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


def _effect(chosen: OtherParts, lines: Sequence[Line[..., Any]]) -> Effect:
    what = [
        back_to("Redis", chosen.redis.manifest.taken) if chosen.redis else "",
        f"Redis has the data of {chosen.redis_survivor.name}" if chosen.redis_survivor else "",
        f"the files go back to {clock.short(chosen.files.manifest.taken)}" if chosen.files else "",
    ]
    down = choose.down_seconds(lines, up=True)
    return Effect(
        ", ".join(filter(None, what)), ", ".join(choose.undo_of_others(chosen)), choose.losses_of_others(chosen), down
    )
