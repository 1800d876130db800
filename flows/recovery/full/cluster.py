"""The cluster from a base backup and WAL, built and proven as a private instance, then swapped in by rename. The first
half touches nothing live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from blocks.environment import Environment
from flows.database import expectations as check
from flows.database.waiting_commits import free_commits
from flows.loss import AGAIN, planned_loss_of, require_confirmed
from flows.recovery.destruction import UNEXPLAINED, read_end
from flows.recovery.full import bring_up, build, migration
from flows.recovery.full.build import StagedCopies
from flows.recovery.full.choose import Chosen
from flows.recovery.full.start import other_databases
from flows.recovery.options import RestoreOptions
from flows.recovery.point import build as point_build
from flows.recovery.point import server_state, swap
from flows.recovery.point.start import start_server
from flows.recovery.restore_option import LOGICAL, Replay, RestoreOption
from flows.recovery.stopped_services import ClusterServices, SystemServices, started_on_failure
from flows.recovery.unlogged import warn_emptied
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.loss import Loss
from runbook.guard.permit import Permit
from runbook.report import Report
from tasks.cluster.fence import FencedServer
from tasks.cluster.instance import PrivateInstance, running
from tasks.cluster.recovery import read_standing, wait_recovered
from tasks.cluster.swap import flush_cluster, sync_cluster
from tasks.host.services import start_services
from tasks.postgres.content.changes import read_states
from tasks.postgres.restore.staged_copy import try_login
from tasks.postgres.server.server import read_server
from tasks.postgres.tables.filenodes import read_database_names
from tasks.redis.restore.swap import start_redis
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.fetch import fetch_histories
from tasks.wal.format.names import lsn_text

MOST_TARGETS = 5
Result = TypeVar("Result")


@dataclass(frozen=True)
class ClusterRun:
    """What a restore of the cluster needs. `databases`: the other databases that a person named: they are set back with
    the application's. `replaces`: whether there is live data. `fenced`: the live server, where it was stopped before
    the copy was built; `settings`: its settings of databases and roles, before that. `measured`: the loss of another
    region's cluster."""

    report: Report
    permit: Permit
    env: Environment
    options: RestoreOptions
    chosen: Chosen
    strict: bool = False
    databases: Sequence[str] = ()
    replaces: bool = True
    fenced: FencedServer | None = None
    settings: frozenset[str] | None = None
    measured: Loss | None = None


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


def plan(
    report: Report,
    env: Environment,
    option: RestoreOption,
    chosen: Chosen,
    of: str,
    revision: str = "",
    *,
    stop_first: bool = False,
) -> None:
    """Plan every step. `of`: whose cluster the copy must be; `revision`: the schema's, as far as it is known;
    `stop_first`: the application and the database server are stopped before the copy is built."""
    if stop_first:
        swap.plan_stopped(report, env)
    plan_copy(report, env, option, of)
    check.plan(report, env)
    build.plan_others(report, env, chosen)
    migration.judge(report, env, revision, chosen.files)
    swap.plan(report, env, stopped=stop_first)
    build.plan_redis_stop(report, env, chosen)
    start = "and its WAL receiver; afterwards: rejoin-standby and backup-cluster"
    report.plan("start the database server", start, seconds=2, by=[start_services])
    build.plan_start(report, env, chosen)


def plan_copy(report: Report, env: Environment, option: RestoreOption, of: str) -> None:
    """Plan the staged copy of the cluster. `of`: as in `plan`."""
    assert option.replay
    only = env.postgres.database if option.extracted_bytes else ""
    warn_emptied(report, env, option.backup.manifest.environment, database=only)
    replay, content = option.replay, option.replay.origin.content
    links, wal = len(replay.found.links), replay.wal_bytes
    report.plan(
        "build the cluster",
        f"{option.backup.name} in {replay.instance.root}",
        size=content.bytes,
        seconds=point_build.expected_seconds(env, point_build.BUILD, content.bytes),
        by=point_build.BUILDS,
    )
    replaying = point_build.expected_seconds(env, point_build.REPLAY, wal)
    report.plan("replay", f"{links} segments of WAL", size=wal, seconds=replaying, by=[wait_recovered])
    use: Literal["swap", "dump"] = "dump" if option.extracted_bytes else "swap"
    point_build.judge_tablespaces(report, env, replay.origin, replay.stop, replay.instance.root / "wal", use)
    last = "the last transaction before the target" if replay.target.destruction else "the last transaction of the WAL"
    report.plan("prove", f"the copy is {of} cluster, with {last}", by=[read_standing])


def build_copies(run: ClusterRun, option: RestoreOption) -> ClusterCopies:
    """Build the cluster and the copies of Redis and the files, and prove them.

    Raises:
        RunbookFailed, VerificationFailed: a copy fails its proof.
    """
    building = build.begin_others(run.permit, run.env, run.chosen)
    try:
        copies = recover_to_target(run, option, lambda found, timeline: _prove(run, found, timeline))
        run.report.fail_if_critical()
        sync_cluster(copies.replay.instance)
        failpoint("full restore: cluster proven")
    except BaseException:
        with contextlib.suppress(Exception):  # the next attempt uses the same directories
            building()
        raise
    others = building()
    build.prove_others(run.report, run.env, run.chosen, others)
    copies.redis, copies.files, copies.strict = others.redis, others.files, run.strict
    run.options.used = copies.option
    return copies


def recover_to_target(run: ClusterRun, option: RestoreOption, use: Callable[[RestoreOption, int], Result]) -> Result:
    """Build the cluster as a private instance, prove that it is at the target, and promote it. Returns the result of
    `use`, called with the option and the new timeline while the instance runs. Where the copy shows that a statement
    destroyed the data, it is built again up to just before that statement.

    Raises:
        RunbookFailed, VerificationFailed: it is not at the target.
    """
    for _ in range(MOST_TARGETS):
        with _recovered(run, option) as timeline:
            assert option.replay
            if _is_at_target(run, option.replay):
                return use(option, timeline)
        option = run.options.again(option)
        confirmed = planned_loss_of(run.report, run.env.postgres.database)
        loss = option.planned_loss(run.env, in_place=run.options.in_place, confirmed=confirmed)
        require_confirmed(run.report, loss, hint=_how_to_choose(option))
    raise VerificationFailed(UNEXPLAINED, "find-transaction shows who deleted it: before=TRANSACTION stops there")


def _how_to_choose(option: RestoreOption) -> str:
    """The next step where the copy showed a statement that the plan could not see: the server did not answer."""
    destroyed = option.replay.target.destruction if option.replay else None
    if not destroyed:
        return AGAIN
    before = destroyed.end.xid or lsn_text(destroyed.begin)
    return (
        f"run this with before={before} to stop just before {destroyed.text}, or with before=none to keep that "
        "statement and everything after it"
    )


@contextlib.contextmanager
def _recovered(run: ClusterRun, option: RestoreOption) -> Iterator[int]:
    """The instance at the target, promoted, while the block runs. Yields its new timeline."""
    report, env = run.report, run.env
    assert option.replay
    replay = option.replay
    origin, instance, stop = replay.origin, replay.instance, replay.stop
    wal = instance.root / "wal"
    point_build.build(report, env, instance, origin, replay.found.links, wal, replay.building)
    # An earlier run may have used the next timeline's number: the archive would refuse it.
    fetch_histories(archive_of(env, "backups", origin.content.system), instance.wal)
    failpoint("full restore: cluster built")
    with running(instance, stop, origin.chain.timeline.number, unsynced=True):
        point_build.recover(report, instance, origin, len(replay.found.links))
        point_build.prove(report, instance, origin, stop)
        # A transaction after the target may hold locks until then: DROP and TRUNCATE do.
        yield swap.promote(env, instance)


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


def _is_at_target(run: ClusterRun, replay: Replay) -> bool:
    """Whether the copy has what it must have at its target. If not, `run.options` knows why.

    Raises:
        VerificationFailed: neither the base backup nor its WAL has the database.
    """
    options, target = run.options, replay.target
    found = read_end(replay.instance.postgres, run.env.postgres.database, options.tables.rows)
    if destroyed := target.destruction:
        has = found.oid == destroyed.database if destroyed.statement == "DROP DATABASE" else bool(found.oid)
        if has and not found.invalid and not found.emptied.lacks(destroyed.tables):
            return True
        options.rejected.add(destroyed.end.xid)
        # An earlier DROP DATABASE was interrupted, or a table was empty when it was dropped: what emptied it is found
        # by its OID, which only the copy knows.
        if found.invalid or found.emptied.empty.keys() & set(destroyed.tables):
            options.end = found
        return False
    if options.end is None and not options.before and found.destroyed:
        options.end = found
        return False
    if found.invalid:
        raise VerificationFailed(
            f"the database {run.env.postgres.database} is invalid in the copy: a DROP DATABASE had begun",
            "choose an earlier target (before=TRANSACTION), or an older base backup (backup=…)",
        )
    if not found.oid:
        raise VerificationFailed(
            f"the copy has no database {run.env.postgres.database}", "restore from a dump (method=dump)"
        )
    return True


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


@contextlib.contextmanager
def swapping_in(
    run: ClusterRun, copies: ClusterCopies, services: SystemServices, cluster: ClusterServices
) -> Iterator[None]:
    """Make the copies live: the cluster, then Redis and the files. If that fails, or the block, before anything was
    replaced, the services that ran are started again.

    Raises:
        OpsError: a rename fails.
    """
    report, permit, env = run.report, run.permit, run.env
    copy = copies.option.copy(env.postgres.database, names=copies.databases)
    with started_on_failure(services), started_on_failure(cluster):
        services.stop()
        services.stop_redis()
        bring_up.pass_others(report, env, services, copies, run.chosen)
        try:
            swap.swap(
                *(report, permit, env, copies.replay.instance, cluster, copies.timeline, copy),
                *(run.fenced, run.measured),
            )
        except BaseException:
            services.swapped += cluster.swapped  # after a half-done swap nothing may be started
            raise
        undo = swap.undo_of(env.postgres, cluster.kept)
        services.has_swapped("database", ", ".join(cluster.kept), bring_up.others_in(copies), undo)
        services.last = cluster.last
        bring_up.swap_others(report, permit, env, services, copies, run.chosen)
        yield


def start_cluster(run: ClusterRun, copies: ClusterCopies, services: SystemServices, cluster: ClusterServices) -> None:
    """Start the database server with its WAL receiver, log in as the application, and migrate.

    Raises:
        OpsError: the server does not start, or refuses the log-in.
    """
    report, permit, env = run.report, run.permit, run.env
    cluster.last = services.last
    start_server(report, env, cluster)
    free_commits(report, permit, env, after=cluster.last)
    name = env.postgres.database
    ready: object = try_login.after(cluster.last)(env.postgres, name)
    if copies.redis:  # a migration may need it
        ready = start_redis.after(ready)(env.redis, env.services)
    services.last = migration.migrate(report, permit, env, name, None, revision="", after=ready) or ready
    cluster.all_started()
