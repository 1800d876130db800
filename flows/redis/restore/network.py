"""Restore over the network, to a server whose files are on another host (§2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.redis.backup import keep_live
from flows.redis.restore import findings, prefixes
from flows.redis.restore.choice import RestorableRedis
from flows.redis.restore.gate import loss_of, pass_serving
from flows.redis.restore.prefixes import KeyRoute
from flows.redis.restore.replacement import attaching
from flows.redis.restore.steps import UNTOUCHED, detach_steps, judge_detaching, put_back
from flows.redis.restore.target import RestoreTarget, find_target, require_same_servers
from runbook.change import Carrier, Change, Check, Line, State
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.report import Report
from runbook.units import duration, size
from tasks.redis.content.reading import drop_prefixes, held_still
from tasks.redis.line import RedisLine, live_line
from tasks.redis.persistence.saving import save_in_background
from tasks.redis.persistence.state import Persistence, read_persistence
from tasks.redis.restore import network as network_restore
from tasks.redis.restore.equal import KeyComparison, compare_keys
from tasks.redis.restore.network import NotReached, forget_dead, replace_by_replication
from tasks.redis.restore.prefixes import Restored, count_keys, find_refusal
from tasks.redis.restore.writes import LiveWrites, watched_writes
from tasks.redis.topology.isolation import detach, note_swapped
from tasks.redis.topology.topology import ReplicationTopology

ALL = (b"",)
BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class KeyByKeyRestore:
    """All data of a live server is replaced key by key. `clearing`: ends what a killed run began."""

    target: RestoreTarget
    live: RedisLine
    keeping: Change[[], str]
    clearing: Change[[], None] | None
    restoring: Change[[LiveWrites], Restored]
    proving: Check[[Restored, LiveWrites, str], None]

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        clearing = [self.clearing] if self.clearing else []
        return [self.keeping, *clearing, self.restoring, self.proving]

    def carry_out(self, carry: Carrier) -> None:
        """Keep the live data as a backup, replace it, and compare every key with the backup.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report states its state.
            RunbookFailed: the live data differs from the backup.
        """
        with watched_writes(self.target.block, self.live, ALL) as writes:
            back = undo_of(carry(self.keeping))
            if self.clearing:
                carry(self.clearing)
            done = carry(self.restoring, writes)
            carry(self.proving, done, writes, back)


@dataclass(frozen=True)
class ReplicatedRestore:
    """All data of a live server is replaced by replication from a scratch server. `fallback`: key by key, where the
    server cannot reach this host."""

    replication: ScratchReplication
    live: RedisLine
    keeping: Change[[], str]
    clearing: Change[[], None] | None
    detaching: Change[[], ReplicationTopology] | None
    replicating: Change[[str], KeyComparison]
    attaching: Change[[ReplicationTopology, str], str] | None
    fallback: Change[[LiveWrites, str], None]
    saving: Change[[Persistence], None]

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return the lines of its plan."""
        found = (self.keeping, self.clearing, self.detaching, self.replicating, self.attaching)
        return [*(one for one in found if one), self.fallback, self.saving]

    def carry_out(self, carry: Carrier) -> None:
        """Keep the live data as a backup, replace it, and compare every key with the backup. Clients cannot write
        meanwhile: replicas and Sentinels are detached, and reattached also after an error.

        Raises:
            OpsError, Unreachable: the server refuses or does not answer; the report states its state.
            RunbookFailed: the live data differs from the backup.
        """
        block = self.replication.target.block
        with watched_writes(block, self.live, ALL) as writes:
            kept = carry(self.keeping)
            if self.clearing:
                carry(self.clearing)
            server = read_persistence(block)
            is_replicated = self._replicate(carry, writes, kept)
            if self.attaching:
                carry(self.attaching, self.replication.taken, kept)
                self.replication.is_attached = True
            if is_replicated:
                carry.skip(self.fallback, "the data was replicated")
                carry(self.saving, server)
            else:
                carry(self.fallback, writes, undo_of(kept))
                carry.skip(self.saving, "the keys were restored one by one")

    def _replicate(self, carry: Carrier, writes: LiveWrites, kept: str) -> bool:
        """Returns False if the server cannot reach this host: its data is unchanged."""
        report, clock = self.replication.report, self.replication.report.seconds
        writes.settle()
        unknown = writes.problem  # read it now: replication flushes the server, which is a problem too
        if self.detaching:
            carry(self.detaching)
        try:
            found = carry(self.replicating, kept)
        except NotReached as error:
            report.warn("replication", error.hint, value=f"{error.message}: restored key by key instead")
            return False
        report.fact("no writes for", duration(report.seconds - clock))
        self.replication.judge(found, unknown, writes, undo_of(kept))
        return True


@dataclass
class ScratchReplication:
    """The live server follows a scratch server until it has the same data. `taken`: the detached servers;
    `is_attached`: they are attached again."""

    report: Report
    env: Environment
    target: RestoreTarget
    route: KeyRoute
    loss: Loss
    taken: ReplicationTopology
    is_attached: bool = False

    def detach(self) -> ReplicationTopology:
        """Detach the replicas and Sentinels."""
        self.taken = detach.bind(self.target.block, self.taken, self.env.reports_directory)()
        return self.taken

    def attach_again(self) -> None:
        """Attach them again, after an error."""
        if not self.is_attached:
            put_back(self.report, self.env, self.taken)

    def replicating(self) -> Change[[str], KeyComparison]:
        """Plan the replication, and the proof of its result before the server is a master again."""
        block, order, reports = self.target.block, self.route.order, self.env.reports_directory
        action = replace_by_replication.bind(block, self.route.scratch, self.target.route, reports)

        def compare() -> KeyComparison:
            return compare_keys(block, self.route.scratch, self.route.live, order, LiveWrites())

        def replicate(kept: str) -> KeyComparison:
            found = action(kept, compare)
            self.taken = note_swapped(reports, self.taken)
            self.report.loses(self.loss)
            return found

        proof = f"{order.keys:,} keys of both servers, in small parts; then it is a master again"
        return Change(
            replicate,
            "replicate",
            f"{block.address} follows a temporary server with the backup, and refuses writes meanwhile; "
            f"{self.target.route.why}",
            size=order.bytes,
            seconds=2 + order.bytes / BYTES_PER_SECOND,
            more=[PlannedStep("prove", proof, seconds=max(0.1, order.keys / prefixes.KEYS_PER_SECOND))],
            by=[action],
            is_final=True,
        )

    def detaching(self) -> Change[[], ReplicationTopology] | None:
        """Plan to detach the replicas and Sentinels; None: there are none."""
        env, around = self.env, self.target.around
        if not (steps := detach_steps(env, around)):
            return None
        first, *others = steps
        return Change(
            self.detach,
            first.step,
            first.detail,
            seconds=first.seconds,
            more=others,
            by=[detach.bind(self.target.block)],
            needs=[partial(judge_detaching, env=env, around=around)],
            reverse=self.attach_again,
        )

    def judge(self, found: KeyComparison, unknown: str, writes: LiveWrites, back: str) -> None:
        """Report the comparison. `writes`: of clients before the replication; `unknown`: why they are not known.

        Raises:
            RunbookFailed: the live data differs from the backup.
        """
        order = self.route.order
        self.report.fact("keys restored", f"{found.equal:,} by replication, {size(order.bytes)} in memory")
        findings.report_unknown_writes(self.report, unknown)
        if len(writes):
            findings.report_lost_writes(self.report, f"up to {len(writes):,} keys", back)
        findings.judge_comparison(self.report, found, None, back)


@contextlib.contextmanager
def prepare(report: Report, env: Environment, chosen: RestorableRedis) -> Iterator[KeyByKeyRestore | ReplicatedRestore]:
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
            route = KeyRoute(target.block, scratch, live, order)
            yield _planned(report, env, target, route, loss_of(chosen.backup))


def _planned(
    report: Report, env: Environment, target: RestoreTarget, route: KeyRoute, loss: Loss
) -> KeyByKeyRestore | ReplicatedRestore:
    _report_killed(report, target)
    keeping, clearing = _keeping(report, env, target, loss), _clearing(env, target)
    restoring = prefixes.restoring(report, env, route, loss, functions=True)
    proving = prefixes.proving(report, env, route)
    if target.route.way == "keys":
        report.fact("key by key, because", target.route.why)
        return KeyByKeyRestore(target, route.live, keeping, clearing, restoring, proving)
    replication, block = ScratchReplication(report, env, target, route, loss, target.around), target.block
    return ReplicatedRestore(
        *(replication, route.live, keeping, clearing),
        replication.detaching(),
        replication.replicating(),
        attaching(report, env, target.around, partial(_may_be_replaced, target)),
        _falling_back(block, restoring, proving),
        Change(
            partial(_save, report, block),
            "save",
            f"the restored data of {block.address}: until then, a restart loads the earlier files",
            is_optional=True,
        ),
    )


def _falling_back(
    block: Redis, restoring: Change[[LiveWrites], Restored], proving: Check[[Restored, LiveWrites, str], None]
) -> Change[[LiveWrites, str], None]:
    def restore(writes: LiveWrites, back: str) -> None:
        proving.work(restoring.work(writes), writes, back)

    detail = f"key by key instead, if {block.address} cannot reach this host"
    return Change(restore, "restore", detail, by=restoring.by, is_optional=True)


def _report_killed(report: Report, target: RestoreTarget) -> None:
    if target.left:
        address = target.block.address
        what = "a replica of a temporary server that no longer exists" if target.follows else "with changed settings"
        report.warn(
            "an earlier restore was killed",
            "confirm this run: it completes the restore",
            value=f"{address} is {what}" if target.follows else f"{address} was left {what}",
            expected="no incomplete restore",
        )


def _keeping(report: Report, env: Environment, target: RestoreTarget, loss: Loss) -> Change[[], str]:
    """The backup of the live data; returns its name. Then the servers must still be those that were judged: the next
    lines replace their data."""
    block, left = target.block, target.left

    def keep() -> str:
        if left:
            report.fact("kept by the killed run", left.kept)
        kept = left.kept if left and target.follows else keep_live(report, env, block).name
        pass_serving(report, block, target.judged, loss)
        require_same_servers(env, target)
        report.fact("undo", undo_of(kept))
        return kept

    kept = f": {left.kept}, of the killed run; no client has written since" if left and target.follows else ""
    return Change(
        keep,
        "keep",
        f"the data of {block.address}, as a backup{kept}",
        begun=UNTOUCHED,
        done=partial(_may_be_replaced, target),
    )


def _clearing(env: Environment, target: RestoreTarget) -> Change[[], None] | None:
    """The end of a killed run."""
    block, reports = target.block, env.reports_directory
    if target.left:
        return Change(
            network_restore.put_back.bind(block, target.left, reports),
            "end the killed restore",
            f"{block.address} is a master with its earlier settings",
        )
    if target.dead:
        forget = forget_dead.bind(block, target.around, reports)
        return Change(forget, "end the killed restore", f"the record of {target.dead}, which is replaced, is deleted")
    return None


def _may_be_replaced(target: RestoreTarget, kept: str) -> State:
    block, back = target.block, undo_of(kept)
    return State(
        f"{block.address} has the earlier data or the backup's, and may be a replica that refuses writes; {kept} has "
        "all earlier data",
        f"run it again: it starts over; or {back}",
    )


def undo_of(kept: str) -> str:
    """The run that undoes it."""
    return f"restore-redis with backup={kept}"


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
