"""The recovery option of a full restore: the cluster from a base backup and WAL, or a dump of the database. `auto`
takes the one that loses least; where its proof fails, the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from blocks.environment import START_ORDER, Environment, Stores
from blocks.postgres.refusals import Starting
from flows.application.files_gate import FilesSource
from flows.database import restore_steps as database
from flows.loss import again_with, require_confirmed
from flows.pinned import pin_database
from flows.recovery import gate
from flows.recovery.destruction import NONE, TARGET
from flows.recovery.full import bring_up, choose, cluster, extraction, recovered
from flows.recovery.full.choose import Chosen
from flows.recovery.full.cluster import ClusterCopies, ClusterLines
from flows.recovery.full.database_server import FoundServer, judge_roles, judge_standby, read_presence, redis_role
from flows.recovery.full.extraction import ExtractedCopies, ExtractionLines
from flows.recovery.full.login import judge_logins
from flows.recovery.full.recovered import ClusterRun
from flows.recovery.full.start import other_databases
from flows.recovery.listing import cluster_obstacle
from flows.recovery.options import RestoreOptions, attempting, require_known
from flows.recovery.point import choice, server_state, swap
from flows.recovery.restore_option import LOGICAL, PHYSICAL, Replay, RestoreOption
from flows.recovery.stopped_services import SystemServices
from flows.redis.restore.sources import RedisSource, remembered, report_newer
from runbook import clock
from runbook.change import Carrier, Line
from runbook.errors import OpsError, Unreachable
from runbook.guard.effect import Effect
from runbook.guard.permit import Act
from runbook.kinds import Pending
from runbook.report import Report
from tasks.backups.catalogue import LATEST, kind_of
from tasks.cluster.copy import BuiltCluster
from tasks.host.services import read_services
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import read_server
from tasks.postgres.sessions.held_writes import held_writes

Method = Literal["auto", "cluster", "dump"]


@dataclass(frozen=True)
class ClusterParameters:
    """The parameters of a run that matter for a restore of the cluster. `latest`: no earlier point in time was asked
    for, although `backup` is a name where a plan for latest is confirmed."""

    method: Method
    backup: str
    latest: bool
    source: Stores
    without: Sequence[choose.Part]
    stop_services: str
    strict: bool
    databases: Sequence[str]
    before: str
    redis_source: RedisSource
    files_source: FilesSource
    jobs: int
    advance: bool
    accept: Sequence[str]
    timeline: int


@dataclass
class ClusterRestore:
    """A chosen restore of the cluster: its option, and the backups of Redis and the files that belong to it."""

    options: RestoreOptions
    option: RestoreOption
    chosen: Chosen
    found: FoundServer

    @property
    def replay(self) -> Replay:
        """How the cluster is built."""
        assert self.option.replay
        return self.option.replay


def find_options(report: Report, env: Environment, given: ClusterParameters) -> RestoreOptions | None:
    """The options between which the run chooses. None: there is only the dump, by the parameters or because the
    environment has no base backups.

    Raises:
        OpsError: method=cluster is impossible, or contradicts `backup`.
    """
    if given.method not in get_args(Method):
        raise OpsError(f"method is “{given.method}”", f"choose one of {', '.join(get_args(Method))}")
    kind = "" if given.backup == LATEST else kind_of(given.backup, "postgres")
    if given.method == "dump" or (given.method == "auto" and kind == "postgres"):
        if kind == "cluster":
            raise OpsError(f"method=dump cannot restore {given.backup}", "give a dump (backup_…), or method=cluster")
        return None
    if kind == "postgres":
        raise OpsError(f"method=cluster cannot restore {given.backup}", "give a base backup (base_…), or method=dump")
    asked = given.method == "cluster" or kind == "cluster"
    if why := cluster_obstacle(env):
        if asked:
            raise OpsError(f"the cluster cannot be restored: {why}", "choose method=dump, or restore-to-point by hand")
        return None
    kinds = (PHYSICAL,) if given.method == "cluster" else (PHYSICAL, LOGICAL)
    before = given.before or gate.target_of_killed_run(report, env)
    if before != given.before:
        report.fact("target of a killed run", f"before={before}")
    options = RestoreOptions(report, env, env.name, given.backup, kinds, given.source, before, timeline=given.timeline)
    require_known(env, env.name, given.backup, stores=given.source)
    if _has_base_backups(options, asked=asked):
        return options
    if asked:
        raise OpsError(
            f"the cluster cannot be restored: there is no base backup of {env.name}'s cluster",
            "choose method=dump; run backup-cluster afterwards",
        )
    return None


def _has_base_backups(options: RestoreOptions, *, asked: bool) -> bool:
    """An unreachable store ends the run: it may hold some. One that is not configured holds none."""
    try:
        return bool(options.base_backups())
    except Unreachable:
        raise
    except OpsError:
        if asked:
            raise
        return False


def decide(
    report: Report, env: Environment, given: ClusterParameters, options: RestoreOptions
) -> ClusterRestore | None:
    """Choose the option with the least loss, and judge it. None: it is the dump.

    Raises:
        OpsError: there is no option.
        RunbookFailed: what the chosen one needs is missing.
    """
    state, silence = read_presence(env)
    others = list[str]()
    if state == "up":
        there = other_databases(env, read_server(env.postgres), env.postgres)
        others = [one for one in there if one not in given.databases]
    if others and given.method == "cluster":
        cluster.judge_others(report, others)
        report.fail_if_critical()
    if others:
        report.fact("other databases, not changed", f"{', '.join(others)} (`databases` names those to set back too)")
    options.others = others
    options.acknowledged = choice.ship(report, env, given.source)
    option = options.choose()
    if not option.replay:
        return None
    if state != "up":
        what = "starting" if isinstance(silence, Starting) else "down" if state == "down" else "missing"
        report.fact("database server", f"{what}: this run stops and replaces it")
        judge_standby(report, env)
    services = read_services(env.services, env.services_in(START_ORDER))
    found = FoundServer(state, services, None)
    running = ", ".join(role for role, runs in services.running.items() if runs) or "none"
    report.fact("services found running", running)
    database.judge_expectations(report, option.backup, strict=given.strict)
    chosen = _with_others(report, env, given, option)
    if not option.extracted_bytes:
        replaced = redis_role(env) if chosen.redis or chosen.redis_survivor else []
        judge_roles(report, env, *replaced, env.postgres.service)
        judge_logins(report, env, state, option.replay.target)
    return ClusterRestore(options, option, chosen, found)


def _with_others(report: Report, env: Environment, given: ClusterParameters, option: RestoreOption) -> Chosen:
    chosen = choose.with_others(
        *(report, env, option.backup, option.newest, given.source, given.without, given.redis_source),
        given.files_source,
        latest=given.latest,
    )
    if chosen.redis_kept and option.replay and not option.replay.target.is_the_end:
        report_newer(report, chosen.redis_kept, option.newest)
    return chosen


def acts(env: Environment, chosen: Chosen) -> tuple[Act, ...]:
    """The acts of all lines that may follow: the run may fall back to another base backup, or to the dump."""
    return tuple(dict.fromkeys([*chosen.acts(env), *swap.acts(env)]))


@dataclass(frozen=True)
class ClusterPlan:
    """How a chosen restore is carried out: its lines, and the rest of its plan."""

    report: Report
    env: Environment
    restore: ClusterRestore
    given: ClusterParameters
    procedure: ClusterLines | ExtractionLines

    @classmethod
    def plan(cls, report: Report, env: Environment, restore: ClusterRestore, given: ClusterParameters) -> ClusterPlan:
        """Plan the lines."""
        option, chosen, stop_first = restore.option, restore.chosen, _stops_first(given, restore)
        procedure: ClusterLines | ExtractionLines
        if option.extracted_bytes:
            procedure = ExtractionLines.plan(
                *(report, env, option, chosen, restore.found, restore.options, given.jobs),
                stop_first=stop_first,
                advance=given.advance,
            )
        else:
            procedure = ClusterLines.plan(
                *(report, env, option, chosen, restore.found.services, "this", restore.options.tables.revision),
                stop_first=stop_first,
            )
        return cls(report, env, restore, given, procedure)

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        return self.procedure.lines

    @property
    def effect(self) -> Effect:
        """For the plan's headline. Its losses are those that a person confirms."""
        option, chosen, found = self.restore.option, self.restore.chosen, self.restore.found
        undo = "" if option.extracted_bytes else "undo-full-restore"
        return Effect(
            choose.whole_system(self.env, chosen, option.newest),
            choose.undo_of(self.env, chosen, found.presence, undo),
            (self.restore.options.loss, *choose.losses_of_others(chosen)),
            choose.down_seconds(self.lines, up=found.presence == "up"),
        )

    def pin(self, report: Report) -> None:
        """Pin what the run replaces."""
        restore = self.restore
        if self.given.databases:
            report.fact("other databases set back too", ", ".join(self.given.databases))
        destroyed = restore.replay.target.destruction
        report.pin_state(TARGET, destroyed.text if destroyed else restore.options.before or "the end of the WAL")
        pin_database(report, self.env.postgres, replaced=True, up=restore.found.presence == "up")
        choose.pin_others(report, self.env, restore.chosen)

    def carry_out(self, carry: Carrier) -> bool:
        """Restore the cluster, or the application's database out of it, from the first base backup that passes its
        proof. False: none does, and the dump is next.

        Raises:
            OpsError: none does, and the dump may not be used; or the swap fails.
        """
        report, env, restore, given, planned = self.report, self.env, self.restore, self.given, self
        while True:
            option = restore.option
            with attempting(report, option.backup.name) as attempt, contextlib.ExitStack() as stack:
                finish = _build(carry, planned, stack)
                remembering = stack.pop_all()
            if not attempt.failure:
                break
            carry.abandon()
            if option.extracted_bytes or not restore.options.others:  # otherwise its database is taken out of it
                restore.options.tried.add(option.backup.name)
            restore.option = restore.options.choose()
            replay = restore.option.replay
            destroyed = replay.target.destruction if replay and restore.options.rejected else None
            hint = again_with(restore.option.backup.name, destroyed.end.xid if destroyed else 0)
            require_confirmed(report, restore.options.loss, hint=hint)
            if not restore.option.replay:
                return False
            restore.chosen = _with_others(report, env, given, restore.option)
            restore.found = replace(restore.found, presence=read_presence(env)[0])
            planned = ClusterPlan.plan(report, env, restore, given)
            report.fail_if_critical()
            carry.instead(*planned.lines, why=f"{option.backup.name} is not used: {attempt.failure}")
        finish(remembering)
        return True


Finish = Callable[[contextlib.AbstractContextManager[object]], None]
"""Makes proven copies live. The block that it is given ends with the swap."""


def _finish_cluster(
    carry: Carrier, planned: ClusterPlan, lines: ClusterLines, run: ClusterRun, copies: ClusterCopies
) -> Finish:
    report, env, chosen = run.report, run.env, planned.restore.chosen

    def finish(remembering: contextlib.AbstractContextManager[object]) -> None:
        with remembering:
            lines.swap_in(carry, run, copies)
        lines.start_cluster(carry, copies)
        lines.start.carry_out(carry, copies)
        _report_results(report, env, run.chosen, copies.option, lines.services)
        redis_is_newer = not chosen.redis and not chosen.redis_kept
        origin = copies.replay.origin
        swap.report_follow_up(report, env, origin, lines.server, copies.timeline, redis_is_newer=redis_is_newer)

    return finish


def _finish_extraction(carry: Carrier, lines: ExtractionLines, run: ClusterRun, copies: ExtractedCopies) -> Finish:
    def finish(remembering: contextlib.AbstractContextManager[object]) -> None:
        with remembering:
            extraction.swap(carry, lines, run, copies)
        lines.system.start.carry_out(carry, copies)
        _report_results(run.report, run.env, run.chosen, copies.option, lines.system.services)

    return finish


def _stops_first(given: ClusterParameters, restore: ClusterRestore) -> bool:
    """Whether the application and the database server stop before the copy is built: while the live server may still
    take writes that the copy must have (it can come back by itself), and before Redis's surviving data is captured."""
    return given.stop_services == "first" or _is_to_the_end(restore) or bool(restore.chosen.redis_survivor)


def _is_to_the_end(restore: ClusterRestore) -> bool:
    return not restore.replay.target.destruction and restore.options.before in ("", NONE)


def _build(carry: Carrier, planned: ClusterPlan, stack: contextlib.ExitStack) -> Finish:
    """Build and prove the copies. Until `stack` is closed, a run after a killed one takes the same source of Redis's
    data."""
    report, env, restore, given, lines = (
        *(planned.report, planned.env, planned.restore),
        *(planned.given, planned.procedure),
    )
    services = lines.services if isinstance(lines, ClusterLines) else lines.system.services
    up, survivor = restore.found.presence == "up", restore.chosen.redis_survivor
    stack.enter_context(remembered(env, survivor or restore.chosen.redis_kept, services.swapped))
    # While the services stop, and the newest WAL is shipped.
    building = recovered.begin_building(carry, lines.building, env, restore.replay)
    run = ClusterRun(
        *(report, env, restore.options, restore.chosen, given.strict, given.databases),
        replaces=restore.found.presence != "absent",
        settings=server_state.read_live_settings(env),
    )
    if isinstance(lines, ExtractionLines):
        restore.chosen = lines.system.stop_first(carry, restore.chosen)
        run = replace(run, chosen=restore.chosen)
        if up and _is_to_the_end(restore):
            _hold_writes(report, env, stack)
        option = _newest(report, env, given, restore, building)
        extracted = extraction.build_copies(carry, lines, run, option, given.jobs, given.accept, stack)
        return _finish_extraction(carry, lines, run, extracted)
    if lines.stop_first:
        before = gate.before_of(restore.replay.stop)
        run = replace(run, fenced=carry(lines.stop, given.source, before))
        restore.chosen = lines.parts.capture(carry, restore.chosen)
        run = replace(run, chosen=restore.chosen)
    option = _newest(report, env, given, restore, building)
    with contextlib.nullcontext() if run.fenced or not up else advisory_lock(env.postgres):
        copies = cluster.build_copies(carry, lines, run, option)
    return _finish_cluster(carry, planned, lines, run, copies)


def _hold_writes(report: Report, env: Environment, stack: contextlib.ExitStack) -> None:
    """Keep the writes of other clients out of the live database until its swap: they would be lost."""
    if problem := stack.enter_context(held_writes(env.postgres, env.postgres.database)):
        report.warn(
            "writes of other clients",
            "stop the clients that write to this database; a write that the copy lacks ends the run before its swap",
            value=f"not held back while the copy is built: {problem}",
        )


def _newest(
    report: Report,
    env: Environment,
    given: ClusterParameters,
    restore: ClusterRestore,
    building: Pending[BuiltCluster],
) -> RestoreOption:
    """The option with what was written since the plan, where it recovers to the end of the WAL."""
    option, up = restore.option, restore.found.presence == "up"
    assert option.replay
    if option.extracted_bytes and up and _is_to_the_end(restore):
        restore.options.acknowledged = choice.ship(report, env, given.source)
    origin = option.replay.origin
    if _is_to_the_end(restore) and choice.with_newest(origin) is not origin:
        return restore.options.again(option, building)
    return replace(option, replay=replace(option.replay, building=building))


def _report_results(
    report: Report,
    env: Environment,
    chosen: Chosen,
    option: RestoreOption,
    services: SystemServices,
) -> None:
    """Compare with the RTO and RPO, and list the lost writes."""
    assert option.replay
    bring_up.judge_time(report, env)
    report.fact("newest point restored", f"{clock.text(option.newest, 'microseconds')}, from {option.kind}")
    gate.judge_objective(report, env, option.newest)
    stored = replace(chosen, database=option.backup)
    bring_up.report_lost_writes(report, env, option.newest, services, stored_are_kept=True)
    bring_up.finish(report, stored)
