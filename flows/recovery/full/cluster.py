"""The cluster from a base backup and WAL, built and proven as a private instance, then swapped in by rename. The first
half touches nothing live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec

from blocks.environment import Environment, Stores
from flows.database import expectations as check
from flows.database.waiting_commits import let_commits_return, plan_override
from flows.recovery import gate
from flows.recovery.full import bring_up, migration
from flows.recovery.full.choose import Chosen
from flows.recovery.full.parts import UNTOUCHED, PartLines, StagedCopies, prove_others
from flows.recovery.full.recovered import ClusterRun, plan_building, plan_replay, recover_to_target
from flows.recovery.full.start import other_databases
from flows.recovery.point import build as point_build
from flows.recovery.point import server_state, swap
from flows.recovery.point.start import start_server
from flows.recovery.restore_option import LOGICAL, Replay, RestoreOption
from flows.recovery.stopped_services import STOP_SECONDS, ClusterServices, SystemServices, read_cluster_services
from runbook.change import Carrier, Change, Line
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from tasks.cluster.copy import BuiltCluster
from tasks.cluster.fence import FencedServer
from tasks.cluster.instance import PrivateInstance
from tasks.cluster.swap import flush_cluster, sync_cluster
from tasks.host.services import ServiceStates
from tasks.postgres.content.changes import read_states
from tasks.postgres.replication.synchronous import Synchrony
from tasks.postgres.restore.staged_copy import try_login
from tasks.postgres.server.server import read_server
from tasks.postgres.tables.filenodes import read_database_names
from tasks.redis.restore.swap import start_redis

P = ParamSpec("P")


@dataclass
class ClusterCopies(StagedCopies):
    """The copies next to the live data. The cluster's is a private instance, stopped, on a new timeline. `databases`:
    its databases by OID."""

    option: RestoreOption = field(kw_only=True)
    timeline: int = field(kw_only=True)
    databases: Mapping[int, str] = field(kw_only=True)

    @property
    def replay(self) -> Replay:
        """How the cluster was built."""
        assert self.option.replay
        return self.option.replay


@dataclass(frozen=True)
class ClusterLines:
    """The lines of a restore that replaces the whole cluster. `stop_first`: the application and the database server are
    stopped before the copy is built. One stop has the only reverse: each service is started again once."""

    report: Report
    env: Environment
    services: SystemServices
    server: ClusterServices
    stop_first: bool
    building: Change[..., BuiltCluster]
    stop: Change[[Stores, str], FencedServer]
    parts: PartLines
    replay: Change[[ClusterRun, RestoreOption], ClusterCopies]
    sync: Change[[PrivateInstance], Path]
    swap: swap.ClusterSwap
    start_server: Change[[], None]
    override: Change[[], Synchrony]
    migration: Sequence[Change[[object], object]]
    start: bring_up.SystemStart

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        option: RestoreOption,
        chosen: Chosen,
        found: ServiceStates,
        of: str,
        revision: str = "",
        *,
        stop_first: bool = False,
    ) -> ClusterLines:
        """Plan the lines. `of`: whose cluster the copy must be; `revision`: the schema's, as far as it is known."""
        assert option.replay
        services, server = bring_up.system_services(report, env, chosen, found), read_cluster_services(report, env)
        server.running = list(dict.fromkeys([*server.running, *services.running]))
        replay = plan_replay(report, env, option, of, _recover)
        check.plan(report, env)
        migrating = migration.judge(report, env, revision, chosen.files)
        server_state.judge(report, env)
        return cls(
            *(report, env, services, server, stop_first),
            plan_building(env, option),
            _plan_stop(report, env, services, server),
            PartLines.plan(report, env, chosen, services),
            replay,
            Change(sync_cluster, swap.SYNC.step, swap.SYNC.detail, seconds=swap.SYNC.seconds),
            swap.ClusterSwap.plan(report, env, server, option.replay.instance, UNTOUCHED),
            Change(
                partial(start_server, report, env, server),
                "start the database server",
                "and its WAL receiver; afterwards: rejoin-standby and backup-cluster",
                seconds=2,
            ),
            plan_override(env),
            _plan_migration(report, env, services, migrating) if migrating else [],
            bring_up.SystemStart.plan(report, env, chosen, services),
        )

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        first: list[Line[..., Any]] = [self.stop, *self.parts.early] if self.stop_first else []
        late: list[Line[..., Any]] = [] if self.stop_first else [self.stop]
        built = [self.building, *first, *self.parts.builds, self.replay, self.sync, self.swap.rehearsal]
        swaps = [*late, *self.parts.late, *self.swap.lines, *self.parts.swaps]
        return [*built, *swaps, self.start_server, self.override, *self.migration, *self.start.lines]

    def swap_in(self, carry: Carrier, run: ClusterRun, copies: ClusterCopies) -> None:
        """Make the copies live: the cluster, then Redis and the files.

        Raises:
            LossExceeded: more than was confirmed. Nothing live was replaced.
            OpsError: a rename fails.
        """
        env, services = self.env, self.services
        copy = copies.option.copy(env.postgres.database, names=copies.databases)
        carry(self.swap.rehearsal)
        fenced = run.fenced or carry(self.stop, "backups", gate.before_of(copy.stop))
        self.parts.stop_late(carry)
        self.parts.pass_gates(copies, run.chosen)
        self.server.last = services.last
        try:
            self.swap.carry_out(carry, copy, copies.timeline, fenced, run.measured)
        except BaseException:
            services.swapped += self.server.swapped  # after a half-done swap nothing may be started
            raise
        undo = swap.undo_of(env.postgres, self.server.kept)
        services.has_swapped("database", ", ".join(self.server.kept), copies.others, undo)
        services.last = self.server.last
        self.parts.swap(carry, copies, run.chosen)

    def start_cluster(self, carry: Carrier, copies: ClusterCopies) -> None:
        """Start the database server with its WAL receiver, log in as the application, and migrate.

        Raises:
            OpsError: the server does not start, or refuses the log-in.
        """
        env, services, server = self.env, self.services, self.server
        server.last = services.last
        carry(self.start_server)
        let_commits_return(self.report, env, carry, self.override)
        services.last = try_login.after(server.last)(env.postgres, env.postgres.database)
        for migrating in self.migration:
            services.last = carry(migrating, copies.redis)
        server.all_started()


def _plan_stop(
    report: Report, env: Environment, services: SystemServices, server: ClusterServices
) -> Change[[Stores, str], FencedServer]:
    def stop(source: Stores, before: str) -> FencedServer:
        services.stop()
        server.last = services.last
        fenced = gate.fence_cluster(report, env, server, source, before)
        services.last = server.last
        return fenced

    def start() -> None:
        if not (services.swapped or server.swapped):
            server.start_again()

    roles = ", ".join(swap.stopped_roles(env))
    return Change(stop, "stop services", roles, seconds=STOP_SECONDS, begun=UNTOUCHED, reverse=start)


def _plan_migration(
    report: Report, env: Environment, services: SystemServices, planned: PlannedStep
) -> list[Change[[object], object]]:
    def migrate(redis: object) -> object:
        ready = services.last
        if redis:  # a migration may need it
            ready = start_redis.after(ready)(env.redis, env.services)
        return migration.migrate(report, env, env.postgres.database, None, revision="") or ready

    return [Change(migrate, planned.step, planned.detail, by=[migration.action_of(env)])]


def build_copies(carry: Carrier, lines: ClusterLines, run: ClusterRun, option: RestoreOption) -> ClusterCopies:
    """Build the cluster and the copies of Redis and the files, and prove them.

    Raises:
        RunbookFailed, VerificationFailed: a copy fails its proof.
    """
    building = lines.parts.begin(carry, run.chosen)
    copies = carry(lines.replay, run, option)
    run.report.fail_if_critical()
    carry(lines.sync, copies.replay.instance)
    failpoint("full restore: cluster proven")
    others = building()
    prove_others(run.report, run.env, run.chosen, others)
    copies.redis, copies.files, copies.strict = others.redis, others.files, run.strict
    run.options.used = copies.option
    return copies


def _recover(run: ClusterRun, option: RestoreOption) -> ClusterCopies:
    return recover_to_target(run, option, lambda found, timeline: _prove(run, found, timeline))


def _prove(run: ClusterRun, option: RestoreOption, timeline: int) -> ClusterCopies:
    """Judge the content of the running copy. Redis and the files are not built yet."""
    report, env = run.report, run.env
    assert option.replay
    instance = option.replay.instance
    _judge_others(run, option)
    flushing = flush_cluster.after(timeline).submit(instance)  # while the content is judged
    rows, name = point_build.compare(report, env, instance), env.postgres.database
    server_state.judge_copy(report, run.settings, instance.postgres)
    databases = read_database_names(instance.postgres)
    copies = ClusterCopies(None, None, rows, option=option, timeline=timeline, databases=databases)
    if run.options.in_place:
        copies.origin = check.ExpectationsOrigin(option.newest)
        checking = check.start(report, env, name, after=timeline, origin=copies.origin, on=instance.postgres)
        _try_login(run, instance)
        copies.rules = check.report_results(report, checking, "on the copy", strict=run.strict)
        copies.states = read_states.after(timeline)(instance.postgres, name)
    flushing.result()
    return copies


def _judge_others(run: ClusterRun, option: RestoreOption) -> None:
    """Judge the swap of every database of the cluster. Those that nobody named may not be set back: they go to the end
    of the WAL with a server that was stopped before, or nothing of them is there."""
    assert option.replay
    if not run.options.in_place:
        return
    copy = option.replay.instance.postgres
    others = other_databases(run.env, read_server(copy), copy)
    at_the_end = bool(run.fenced) and option.replay.target.is_the_end
    if others and (not run.replaces or at_the_end):
        run.report.fact("other databases restored too", f"{', '.join(others)}" + ", to the end of the WAL" * at_the_end)
        return
    others = tuple(one for one in others if one not in run.databases)
    if others and LOGICAL in run.options.kinds:  # method=cluster sets back what was named, and nothing else
        run.options.others = others
        raise VerificationFailed(
            f"the cluster also has {', '.join(others)}",
            "nothing to do: the run takes only the application's database out of the cluster",
        )
    judge_others(run.report, others)
    run.report.fail_if_critical()


def judge_others(report: Report, others: Sequence[str]) -> None:
    """Whether other databases would be set back with the application's, without being named."""
    report.require(
        "other databases of the cluster",
        not others,
        f"method=cluster with databases={' '.join(others)} sets them back too; method=auto restores this database only",
        value=", ".join(others) or "none, or named",
        expected="none, or named in databases",
    )


def _try_login(run: ClusterRun, instance: PrivateInstance) -> None:
    """Log in as the application's role, with its password as of the target."""
    user = try_login(instance.postgres.model_copy(update={"host": "127.0.0.1"}), run.env.postgres.database)
    run.report.require("log-in of the application's role to the copy", user == run.env.postgres.user, "", value=user)
