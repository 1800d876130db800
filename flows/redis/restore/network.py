"""Restore over the network, to a server whose files are on another host (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import redis

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import keep_live
from flows.redis.master import judge_master
from flows.redis.restore import findings, prefixes
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import loss_of, pass_serving
from flows.redis.restore.steps import plan_detaching, put_back
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration, size
from tasks.backups import publishing
from tasks.redis.content.reading import drop_prefixes, held_still
from tasks.redis.line import RedisLine, live_line
from tasks.redis.persistence.saving import save_in_background
from tasks.redis.persistence.state import Persistence, read_persistence
from tasks.redis.restore import network as network_restore
from tasks.redis.restore.equal import KeyComparison, compare_keys
from tasks.redis.restore.live import LiveRedis, read_live
from tasks.redis.restore.network import (
    ACT,
    NotReached,
    RedisLeftover,
    find_leftover,
    forget_dead,
    replace_by_replication,
    still_follows,
)
from tasks.redis.restore.prefixes import ACT as RESTORE_KEYS
from tasks.redis.restore.prefixes import RestoreOrder, count_keys, find_refusal, restore_functions, restore_keys
from tasks.redis.restore.route import Route, find_route
from tasks.redis.restore.writes import LiveWrites, watched_writes
from tasks.redis.sentinels import Watch, read_sentinels
from tasks.redis.server import answers
from tasks.redis.topology.isolation import TAKE_OFF, detach, note_swapped
from tasks.redis.topology.topology import ReplicationTopology, find_record, read_topology

ALL = (b"",)
BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class NetworkRestore:
    """A backup in a scratch server, and the live server that gets its data."""

    report: Report
    env: Environment
    target: RestoreTarget
    scratch: redis.Redis
    live: RedisLine
    order: RestoreOrder
    loss: Loss

    @property
    def acts(self) -> tuple[Act, ...]:
        """The acts of its permit; the restore key by key is the fallback."""
        return (
            Act(ACT, self.target.block.address),
            Act(RESTORE_KEYS, self.order.target),
            Act(TAKE_OFF, self.env.redis.data_directory),
        )

    def run(self, permit: Permit) -> None:
        """Keep the live data as a backup, replace it, and compare every key with the backup.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report states its state.
            RunbookFailed: the live data differs from the backup.
        """
        with watched_writes(self.target.block, self.live, ALL) as writes:
            _restore(self.report, self.env, permit, self.target, self.scratch, self.live, self.order, writes, self.loss)
        self.report.loses(self.loss)


@contextlib.contextmanager
def prepare(report: Report, env: Environment, chosen: RestorableRedis) -> Iterator[NetworkRestore]:
    """Load and prove the backup, leave out drop_prefixes, count the keys, check the live server, and plan.

    Raises:
        OpsError, Unreachable: the live server refuses or does not answer.
        RunbookFailed: the backup differs from its manifest, or a check failed.
    """
    with prefixes.loaded(report, env, chosen) as scratch:
        dropped = drop_prefixes(scratch, env.redis.drop_prefixes)
        report.fact("keys left out", ", ".join(f"{name} {count:,}" for name, count in dropped.items()) or "none")
        target = find_target(report, env, int(scratch.info("memory")["used_memory"]))
        with held_still(scratch), live_line(target.block) as live:
            order = count_keys(target.block, scratch, live, ALL, "remove")
            refusal = find_refusal(target.block, scratch, live, order, left_following=target.follows)
            prefixes.judge(report, env, target.block, order, refusal, whole=True)
            _plan(report, env, target, order)
            yield NetworkRestore(report, env, target, scratch, live, order, loss_of(chosen.backup))


def _plan(report: Report, env: Environment, target: RestoreTarget, order: RestoreOrder) -> None:
    block, left = target.block, target.left
    if left:
        what = "a replica of a temporary server that no longer exists" if target.follows else "with changed settings"
        report.warn(
            "an earlier restore was killed",
            "confirm this run: it completes the restore",
            value=f"{block.address} is {what}" if target.follows else f"{block.address} was left {what}",
            expected="no incomplete restore",
        )
    kept = f": {left.kept}, of the killed run; no client has written since" if left and target.follows else ""
    report.plan("keep", f"the data of {block.address}, as a backup{kept}", by=[publishing.publish])
    if target.route.way == "replication":
        plan_detaching(report, env, target.around)
        report.plan(
            "replicate",
            f"{block.address} follows a temporary server with the backup, and refuses writes meanwhile; "
            f"{target.route.why}",
            size=order.bytes,
            by=[network_restore.replace_by_replication],
            seconds=2 + order.bytes / BYTES_PER_SECOND,
        )
        report.plan(
            "prove",
            f"{order.keys:,} keys of both servers, in small parts; then it is a master again",
            seconds=max(0.1, order.keys / prefixes.KEYS_PER_SECOND),
        )
        return
    report.fact("key by key, because", target.route.why)
    prefixes.plan(report, order)


def _restore(
    report: Report,
    env: Environment,
    permit: Permit,
    target: RestoreTarget,
    scratch: redis.Redis,
    live: RedisLine,
    order: RestoreOrder,
    writes: LiveWrites,
    loss: Loss,
) -> None:
    block, left = target.block, target.left
    report.state_is("the live data was not touched", "fix the findings above, then run it again")
    if left:
        report.fact("kept by the killed run", left.kept)
    kept = left.kept if left and target.follows else keep_live(report, env, block).name
    pass_serving(report, block, target.judged, loss)
    _judge_same(env, target)
    back = f"restore-redis with backup={kept}"
    report.fact("undo", back)
    if left:
        network_restore.put_back(permit, block, left, env.reports_directory)
    if target.dead:
        forget_dead(permit, block, target.around, env.reports_directory)
    report.state_is(
        f"{block.address} has the earlier data or the backup's, and may be a replica that refuses writes; {kept} has "
        "all earlier data",
        f"run it again: it starts over; or {back}",
    )
    if target.route.way == "replication":
        server = read_persistence(block)
        writes.settle()
        unknown = writes.problem  # read it now: replication flushes the server, which is a problem too
        try:
            found = _replicate(report, env, permit, target, scratch, live, order, kept)
        except NotReached as error:
            report.warn("replication", error.hint, value=f"{error.message}: restored key by key instead")
        else:
            findings.report_unknown_writes(report, unknown)
            if len(writes):
                findings.report_lost_writes(report, f"up to {len(writes):,} keys", back)
            findings.judge_comparison(report, found, None, back)
            _save(report, block, server)
            return
    _by_keys(report, env, permit, block, scratch, live, order, writes, back)


def _judge_same(env: Environment, target: RestoreTarget) -> None:
    """Master, replicas and Sentinels are still those of the plan: the backup of the live data takes time.

    Raises:
        OpsError: they changed.
    """
    now = read_topology(target.block, env.reports_directory, of_dead=bool(target.dead))
    planned = target.around
    if now.master != planned.master:
        what = now.disagreement or (f"{now.master} was promoted" if now.master else "there was no master")
        raise OpsError(f"{what} during the backup of the live data", "run it again: it finds the new master")
    changed = [now.others, now.lost, now.watchers] != [planned.others, planned.lost, planned.watchers]
    if changed and target.route.way == "replication":
        raise OpsError("replicas or Sentinels changed during the backup of the live data", "run it again")


def _replicate(
    report: Report,
    env: Environment,
    permit: Permit,
    target: RestoreTarget,
    scratch: redis.Redis,
    live: RedisLine,
    order: RestoreOrder,
    kept: str,
) -> KeyComparison:
    """Clients cannot write meanwhile. Replicas and Sentinels are detached, and reattached also after an error."""
    block, reports, clock = target.block, env.reports_directory, report.seconds
    taken, nobody = target.around, LiveWrites()

    def compare() -> KeyComparison:
        return compare_keys(block, scratch, live, order, nobody)

    try:
        taken = detach(permit, block, taken, reports)
        found = replace_by_replication.after(taken)(permit, block, scratch, target.route, kept, reports, compare)
        taken = note_swapped(reports, taken)
    except BaseException:
        try:
            put_back(report, env, permit, taken)
        except OpsError as second:  # report the first error first
            report.fail("replicas and Sentinels reattached", second.hint, value=second.message)
        raise
    report.fact("no writes for", duration(report.seconds - clock))
    report.fact("keys restored", f"{found.equal:,} by replication, {size(order.bytes)} in memory")
    if not found.differences:
        put_back(report, env, permit, taken)
    return found


def _save(report: Report, block: Redis, before: Persistence) -> None:
    """Save the restored data: until then, a restart would load the earlier files. Clients are already served."""
    try:
        save_in_background(block, before)
    except OpsError as error:
        report.fail(
            "the restored data is saved",
            f"{error.hint}; do not restart the server before snapshot-redis succeeds",
            value=error.message,
            expected="saved to disk: a restart would load the earlier data",
            follow=[Next("snapshot-redis", "save the restored data")],
        )


def _by_keys(
    report: Report,
    env: Environment,
    permit: Permit,
    block: Redis,
    scratch: redis.Redis,
    live: RedisLine,
    order: RestoreOrder,
    writes: LiveWrites,
    back: str,
) -> None:
    done = restore_keys(permit, block, scratch, live, order, writes)
    if problem := restore_functions(permit, block, scratch, live, order):
        report.warn("functions", "restore them by hand: FUNCTION RESTORE", value=problem)
    findings.report_restored(report, done, writes)
    found = compare_keys.after(done)(block, scratch, live, order, writes)
    prefixes.require_same(env, block, waived=True)
    findings.judge_comparison(report, found, writes, back)


@dataclass(frozen=True)
class RestoreTarget:
    """The live server, its replication topology, the route for the data, and what a killed restore left. `dead`: the
    server of a killed restore that no longer answers, if another server replaced it."""

    block: Redis
    around: ReplicationTopology
    route: Route
    left: RedisLeftover | None
    follows: bool
    judged: LiveRedis
    dead: str = ""


def find_target(report: Report, env: Environment, needed_bytes: int) -> RestoreTarget:
    """Find the server, and the route for a backup of `needed_bytes`.

    Raises:
        OpsError, Unreachable: it refuses, or does not answer. After a killed restore the hint names the next step.
    """
    left, record = find_leftover(env.reports_directory), find_record(env.reports_directory)
    # Sentinels that a killed run detached know no master; its record does.
    known = left.server if left else record.own if record else ""
    watch = read_sentinels(env.redis)
    dead = known if known and not answers(env.redis.at(known)) else ""
    if dead:
        _require_successor(env, dead, watch, left, record)
        left = None
    block = (
        env.redis.at(known) if known and not dead else judge_master(report, env.redis, watch, changes=True, waiver=None)
    )
    judged = read_live(block)
    report.fact("server", block.address)
    if dead:
        host, _, port = block.address.rpartition(":")
        report.warn(
            "an earlier restore was killed",
            f"when {dead} answers again: REPLICAOF {host} {port} on it",
            value=f"its server {dead} does not answer; this run restores {block.address}",
        )
    around = read_topology(block, env.reports_directory, of_dead=bool(dead))
    route = find_route(block, needed_bytes)
    return RestoreTarget(block, around, route, left, bool(left and still_follows(block, left)), judged, dead)


def _require_successor(
    env: Environment, dead: str, watch: Watch, left: RedisLeftover | None, record: ReplicationTopology | None
) -> None:
    """The Sentinels or the environment name another master now.

    Raises:
        OpsError: they do not; the hint names the next step.
    """
    if any(master not in ("", dead) for master in watch.masters) or (not watch.views and env.redis.address != dead):
        return
    kept = f" (its earlier data is kept as {left.kept})" if left else ""
    what = f"{dead}, the server of a killed restore, does not answer{kept}"
    again = f"start it and run this again: it continues. If {dead} is lost for good"
    if not watch.views:
        raise OpsError(
            what,
            f"{again}: name the server that replaces it as host and port in [redis], register the blocks, and run this "
            "again",
        )
    others = [address for address in (record.others if record else ()) if answers(env.redis.at(address))]
    quorum = max((watcher.quorum for watcher in record.watchers), default=2) if record else 2
    new, name = others[0] if len(others) == 1 else "<host>:<port>", env.redis.sentinel_master
    sentinels = ", ".join(view.address for view in watch.views)
    raise OpsError(
        what,
        f"{again}: REPLICAOF NO ONE on {' or '.join(others) or 'the server that replaces it'}, then on each Sentinel "
        f"({sentinels}) SENTINEL MONITOR {name} {' '.join(new.rsplit(':', 1))} {quorum} and SENTINEL SET {name} "
        "auth-pass <password>, and run this again",
    )
