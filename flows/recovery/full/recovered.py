"""A staged copy of the cluster in a full restore: built from a base backup and WAL as a private instance, and recovered
to its target. Nothing live is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

from blocks.environment import Environment
from flows.database.base_backup import wal_of
from flows.loss import AGAIN, planned_loss_of, require_confirmed
from flows.recovery.destruction import UNEXPLAINED, read_end
from flows.recovery.full.choose import Chosen
from flows.recovery.full.parts import UNTOUCHED
from flows.recovery.options import RestoreOptions
from flows.recovery.point import build as point_build
from flows.recovery.point import swap
from flows.recovery.restore_option import Replay, RestoreOption
from flows.recovery.unlogged import warn_emptied
from runbook.change import BegunLine, Carrier, Change
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.loss import Loss
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from tasks.cluster.copy import BuiltCluster, build_instance
from tasks.cluster.fence import FencedServer
from tasks.cluster.instance import running
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.fetch import fetch_histories
from tasks.wal.format.names import lsn_text

P = ParamSpec("P")
MOST_TARGETS = 5
Result = TypeVar("Result")


@dataclass(frozen=True)
class ClusterRun:
    """What a restore of the cluster needs. `databases`: the other databases that a person named: they are set back with
    the application's. `replaces`: whether there is live data. `fenced`: the live server, where it was stopped before
    the copy was built; `settings`: its settings of databases and roles, before that. `measured`: the loss of another
    region's cluster."""

    report: Report
    env: Environment
    options: RestoreOptions
    chosen: Chosen
    strict: bool = False
    databases: Sequence[str] = ()
    replaces: bool = True
    fenced: FencedServer | None = None
    settings: frozenset[str] | None = None
    measured: Loss | None = None


def plan_building(env: Environment, option: RestoreOption) -> Change[..., BuiltCluster]:
    """Plan the data directory of the staged copy."""
    assert option.replay
    bytes_ = option.replay.origin.content.bytes
    return Change(
        build_instance,
        "build the cluster",
        f"{option.backup.name} in {option.replay.instance.root}",
        size=bytes_,
        seconds=point_build.expected_seconds(env, point_build.BUILD, bytes_),
        begun=UNTOUCHED,
    )


def begin_building(
    carry: Carrier, line: Change[..., BuiltCluster], env: Environment, replay: Replay
) -> BegunLine[BuiltCluster]:
    """Begin to build the data directory, which does not depend on the newest WAL."""
    return carry.begin(line, replay.instance, replay.origin.whole, wal=wal_of(env))


def plan_replay(
    report: Report,
    env: Environment,
    option: RestoreOption,
    of: str,
    recover: Callable[P, Result],
    more: Sequence[PlannedStep] = (),
) -> Change[P, Result]:
    """Plan the recovery of the staged copy to its target, and its proof, which one call carries out: a statement that
    the copy shows may begin it anew. `of`: as in `ClusterLines.plan`."""
    assert option.replay
    only = env.postgres.database if option.extracted_bytes else ""
    warn_emptied(report, env, option.backup.manifest.environment, database=only)
    replay = option.replay
    use: Literal["swap", "dump"] = "dump" if option.extracted_bytes else "swap"
    point_build.judge_tablespaces(report, env, replay.origin, replay.stop, replay.instance.root / "wal", use)
    last = "the last transaction before the target" if replay.target.destruction else "the last transaction of the WAL"
    return Change(
        recover,
        "replay",
        f"{len(replay.found.links)} segments of WAL",
        size=replay.wal_bytes,
        seconds=point_build.expected_seconds(env, point_build.REPLAY, replay.wal_bytes),
        more=[PlannedStep("prove", f"the copy is {of} cluster, with {last}"), point_build.PROMOTE, *more],
        begun=UNTOUCHED,
    )


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
