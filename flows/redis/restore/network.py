"""restore-redis to a server whose files cannot be reached from here (§2.3): plain functions with the open report."""

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
from flows.redis.restore.choice import Restorable
from flows.redis.restore.steps import plan_detaching, put_back
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.units import duration, size
from tasks.redis.content.reading import drop_prefixes, held_still
from tasks.redis.line import Line, live_line
from tasks.redis.persistence.saving import save_in_background
from tasks.redis.persistence.state import Persistence, read_persistence
from tasks.redis.restore import network as network_restore
from tasks.redis.restore.equal import Comparison, compare_keys
from tasks.redis.restore.network import (
    ACT,
    Leftover,
    NotReached,
    find_leftover,
    forget_dead,
    replace_by_replication,
    still_follows,
)
from tasks.redis.restore.prefixes import ACT as RESTORE_KEYS
from tasks.redis.restore.prefixes import Order, count_keys, find_refusal, restore_functions, restore_keys
from tasks.redis.restore.route import Route, find_route
from tasks.redis.restore.writes import Writes, watched_writes
from tasks.redis.sentinels import Watch, read_sentinels
from tasks.redis.server import answers
from tasks.redis.topology.isolation import TAKE_OFF, detach, note_swapped
from tasks.redis.topology.topology import ReplicationTopology, find_record, read_surroundings

ALL = (b"",)
BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class NetworkRestore:
    """A backup in a scratch server, and the live server that is to hold the same."""

    report: Report
    env: Environment
    target: Target
    scratch: redis.Redis
    live: Line
    order: Order

    @property
    def acts(self) -> tuple[Act, ...]:
        """What it needs a permit for: it goes key by key where it turns out that it must."""
        return (
            Act(ACT, self.target.block.address),
            Act(RESTORE_KEYS, self.order.target),
            Act(TAKE_OFF, self.env.redis.data_directory),
        )

    def run(self, permit: Permit) -> None:
        """Keep what is live, put the backup in its place, and prove that key by key.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report says in what state it is.
            RunbookFailed: what is live afterwards is not what the backup holds.
        """
        with watched_writes(self.target.block, self.live, ALL) as writes:
            _restore(self.report, self.env, permit, self.target, self.scratch, self.live, self.order, writes)


@contextlib.contextmanager
def prepare(report: Report, env: Environment, chosen: Restorable) -> Iterator[NetworkRestore]:
    """Load and prove the backup, leave out what is made anew anyway, count, judge and plan.

    Raises:
        OpsError, Unreachable: the live server refuses or does not answer.
        RunbookFailed: the backup is not what it should be, or something stands in the way.
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
            yield NetworkRestore(report, env, target, scratch, live, order)


def _plan(report: Report, env: Environment, target: Target, order: Order) -> None:
    block, left = target.block, target.left
    if left:
        what = "a replica of a temporary server that is gone" if target.follows else "with some settings changed"
        report.warn(
            "an earlier restore was killed",
            "this run puts it right",
            value=f"it left {block.address} {what}",
            expected="nothing",
        )
    kept = f": {left.kept}, of the killed run; nobody has written since" if left and target.follows else ""
    report.plan("keep", f"what {block.address} holds, as a backup{kept}")
    if target.route.way == "replication":
        plan_detaching(report, env, target.around)
        report.plan(
            "replicate",
            f"{block.address} follows a temporary server that holds the backup, and takes no writes "
            f"meanwhile; {target.route.why}",
            size=order.bytes,
            seconds=2 + order.bytes / BYTES_PER_SECOND,
        )
        report.plan(
            "prove",
            f"{order.keys:,} keys of both sides, in small pieces; then it is a master again",
            seconds=max(0.1, order.keys / prefixes.KEYS_PER_SECOND),
        )
        return
    report.fact("key by key, since", target.route.why)
    prefixes.plan(report, order)


def _restore(
    report: Report,
    env: Environment,
    permit: Permit,
    target: Target,
    scratch: redis.Redis,
    live: Line,
    order: Order,
    writes: Writes,
) -> None:
    block, left = target.block, target.left
    report.state_is("the live data was not touched", "launch it again when what is said above is put right")
    if left:
        report.fact("kept by the killed run", left.kept)
    kept = left.kept if left and target.follows else keep_live(report, env, block).name
    _judge_same(env, target)
    back = f"restore-redis with backup={kept}"
    report.fact("undo", back)
    if left:
        network_restore.put_back(permit, block, left, env.reports_directory)
    if target.dead:
        forget_dead(permit, block, target.around, env.reports_directory)
    report.state_is(
        f"{block.address} holds data of before or of the backup, and may be a replica that takes no writes; all of "
        f"before is in {kept}",
        f"launch it again: it begins from the start and ends well; or {back}",
    )
    if target.route.way == "replication":
        server = read_persistence(block)
        writes.settle()
        unknown = writes.problem  # afterwards it is that everything was flushed
        try:
            found = _replicate(report, env, permit, target, scratch, live, order, kept)
        except NotReached as error:
            report.warn("by replication", error.hint, value=f"{error.message}: key by key instead")
        else:
            findings.tell_unknown(report, unknown)
            if len(writes):
                findings.tell_lost(report, f"up to {len(writes):,} keys", back)
            findings.tell_comparison(report, found, None, back)
            _save(report, block, server)
            return
    _by_keys(report, env, permit, block, scratch, live, order, writes, back)


def _judge_same(env: Environment, target: Target) -> None:
    """Keeping the live data takes its time: who is the master, and who stands around it, is as it was planned.

    Raises:
        OpsError: it is not.
    """
    now = read_surroundings(target.block, env.reports_directory, of_dead=bool(target.dead))
    planned = target.around
    if now.master != planned.master:
        told = now.disagreement or f"{now.master or 'nobody'} was made the master"
        raise OpsError(f"{told} while the live data was kept", "launch it again: the master is found anew")
    changed = [now.others, now.lost, now.watchers] != [planned.others, planned.lost, planned.watchers]
    if changed and target.route.way == "replication":
        raise OpsError("replicas or Sentinels came or went while the live data was kept", "launch it again")


def _replicate(
    report: Report,
    env: Environment,
    permit: Permit,
    target: Target,
    scratch: redis.Redis,
    live: Line,
    order: Order,
    kept: str,
) -> Comparison:
    """Nobody writes meanwhile; replicas and Sentinels are taken off before, and put back however it ends."""
    block, reports, clock = target.block, env.reports_directory, report.seconds
    taken, nobody = target.around, Writes()

    def compare() -> Comparison:
        return compare_keys(block, scratch, live, order, nobody)

    try:
        taken = detach(permit, block, taken, reports)
        found = replace_by_replication.after(taken)(permit, block, scratch, target.route, kept, reports, compare)
        taken = note_swapped(reports, taken)
    except BaseException:
        try:
            put_back(report, env, permit, taken)
        except OpsError as second:  # the first error is the one to read first
            report.fail("replicas and Sentinels put back", second.hint, value=second.message)
        raise
    report.fact("no writes for", duration(report.seconds - clock))
    report.fact("keys restored", f"{found.equal:,} by replication, {size(order.bytes)} in memory")
    if not found.differences:
        put_back(report, env, permit, taken)
    return found


def _save(report: Report, block: Redis, before: Persistence) -> None:
    """Clients are served by now. A full transfer leaves the RDB of before on the server's disk, and its AOF is written
    anew: until that is done, a start brings back what was there before."""
    try:
        save_in_background(block, before)
    except OpsError as error:
        report.fail(
            "the restored data is saved",
            f"{error.hint}; until snapshot-redis ends well, do not restart it",
            value=error.message,
            expected="on its disk: a start would load what was there before",
        )


def _by_keys(
    report: Report,
    env: Environment,
    permit: Permit,
    block: Redis,
    scratch: redis.Redis,
    live: Line,
    order: Order,
    writes: Writes,
    back: str,
) -> None:
    done = restore_keys(permit, block, scratch, live, order, writes)
    if problem := restore_functions(permit, block, scratch, live, order):
        report.warn("functions", "FUNCTION RESTORE them by hand", value=problem)
    findings.tell_restored(report, done, writes)
    found = compare_keys.after(done)(block, scratch, live, order, writes)
    prefixes.require_same(env, block, waived=True)
    findings.tell_comparison(report, found, writes, back)


@dataclass(frozen=True)
class Target:
    """The live server, what stands around it, how data gets into it, and what a killed restore left there. `dead` is
    the server of a killed restore that does not answer any more, where another has taken its place."""

    block: Redis
    around: ReplicationTopology
    route: Route
    left: Leftover | None
    follows: bool
    dead: str = ""


def find_target(report: Report, env: Environment, needed_bytes: int) -> Target:
    """Find the server, and how a backup of `needed_bytes` gets into it.

    Raises:
        OpsError, Unreachable: it refuses, or does not answer; where a killed restore was for it, what to do then.
    """
    left, record = find_leftover(env.reports_directory), find_record(env.reports_directory)
    # Sentinels that a killed run took off know no master: what it wrote down does.
    known = left.server if left else record.own if record else ""
    watch = read_sentinels(env.redis)
    dead = known if known and not answers(env.redis.at(known)) else ""
    if dead:
        _require_successor(env, dead, watch, left, record)
        left = None
    block = (
        env.redis.at(known) if known and not dead else judge_master(report, env.redis, watch, changes=True, waiver=None)
    )
    report.fact("server", block.address)
    if dead:
        host, _, port = block.address.rpartition(":")
        report.warn(
            "an earlier restore was killed",
            f"when {dead} is back: REPLICAOF {host} {port} on it",
            value=f"{dead}, for which it was, does not answer: this run is for {block.address}",
        )
    around = read_surroundings(block, env.reports_directory, of_dead=bool(dead))
    route = find_route(block, needed_bytes)
    return Target(block, around, route, left, bool(left and still_follows(block, left)), dead)


def _require_successor(
    env: Environment, dead: str, watch: Watch, left: Leftover | None, record: ReplicationTopology | None
) -> None:
    """Somebody else is the master by now, by the Sentinels' word or by the environment's.

    Raises:
        OpsError: nobody is; what to do.
    """
    if any(master not in ("", dead) for master in watch.masters) or (not watch.views and env.redis.address != dead):
        return
    kept = f" (what was live before is kept as {left.kept})" if left else ""
    what = f"{dead}, for which a restore was killed, does not answer{kept}"
    again = f"start it and launch this again: it goes on there. If {dead} is gone for good"
    if not watch.views:
        raise OpsError(
            what,
            f"{again}: name the server that takes its place as host and port in [redis], register the "
            "blocks, and launch this again: it goes on there",
        )
    others = [address for address in (record.others if record else ()) if answers(env.redis.at(address))]
    quorum = max((watcher.quorum for watcher in record.watchers), default=2) if record else 2
    new, name = others[0] if len(others) == 1 else "<host>:<port>", env.redis.sentinel_master
    sentinels = ", ".join(view.address for view in watch.views)
    raise OpsError(
        what,
        f"{again}: REPLICAOF NO ONE on {' or '.join(others) or 'the server in its place'}, then on each Sentinel "
        f"({sentinels}) SENTINEL MONITOR {name} {' '.join(new.rsplit(':', 1))} {quorum} and SENTINEL SET {name} "
        "auth-pass <password>, and launch this again: it goes on there",
    )
