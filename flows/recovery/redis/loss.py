"""The acknowledged writes that a Redis failover lost, or may have lost (§8.3)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.redis.server import Redis
from flows.loss import require_confirmed
from runbook.guard.loss import Loss
from runbook.report import Report
from tasks.redis.failover.group import Group, GroupMember, LastSeen, read_last_seen, read_member
from tasks.redis.failover.ledger import RedisFailoverMarker
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import HandOver
from tasks.redis.position import StreamPosition, known_positions, received
from tasks.redis.restore.survivors import PART, SurvivingCopy, measured

# INCR of a one-letter key, in the replication stream.
SHORTEST_WRITE_BYTES = 21


@dataclass(frozen=True)
class Before:
    """The dead master as known when the run began: the last INFO that a Sentinel kept, the latest possible time of its
    death (this host's clock, seconds), and every position of it that is known."""

    seen: LastSeen | None
    died: float
    known: tuple[StreamPosition, ...] = ()

    @classmethod
    def read(cls, block: Redis, group: Group, reports: Path) -> Before:
        """Read it early: the Sentinels drop it at the end of a failover."""
        silent = [m.silent_seconds for m in group.others if not m.problem and not m.is_master]
        down_after = "down-after-milliseconds"
        # A Sentinel sees it as down this long after the first unanswered PING. A replica whose link broke earlier knows
        # nothing of the time in between.
        unanswered = [v.down_seconds + v.settings.get(down_after, 0) / 1000 for v in group.watch.views if v.sees_down]
        now = time.time()
        died = now - min(min(silent, default=0), min(unanswered, default=0))
        return cls(read_last_seen(block, group.watch), died, known_positions(block, reports))

    def loss_with(self, member: GroupMember) -> Loss:
        """What is lost if this replica becomes the master, or has become it: by its offset in the master's stream."""
        if member.problem:
            return Loss.not_known(PART, f"{member.address} does not answer")
        return measured(SurvivingCopy("replica", member.address, received=received(member)), self.known).loss


@dataclass(frozen=True)
class FailoverGate:
    """The gate of a failover from a dead master, directly before this run starts it. The Sentinels take the replica
    that has the largest offset. They can be faster than the run: then the loss is only measured."""

    report: Report
    block: Redis
    before: Before

    def __call__(self, replicas: Sequence[str]) -> None:
        """Compare what the replicas lack now with what was confirmed.

        Raises:
            LossExceeded: the one that would be promoted lacks more. No replica was promoted.
        """
        members = [read_member(self.block, address) for address in replicas]
        require_confirmed(self.report, self.before.loss_with(max(members, key=lambda member: member.offset)))


def report_planned_loss(report: Report, done: HandOver) -> None:
    """Prove that the new master has every acknowledged write."""
    missing = done.missing_bytes
    _report_ledger(report, done)
    value = {
        -1: "unknown: the new master does not continue the old one's stream",
        0: f"the old master stopped at offset {done.stood:,}; the new one was promoted at {done.new.promoted_at:,}",
    }.get(
        missing,
        f"{missing:,} bytes of the stream are missing: {done.stood:,}, but {done.new.promoted_at:,} on the new master",
    )
    report.require(
        "every acknowledged write is on the new master",
        missing == 0,
        f"read the missing writes from the AOF of {done.old}; compare with the application's records",
        value=value,
        expected="promoted with every byte",
    )
    report.prefer(
        "pause of writes without a gap",
        done.unbroken,
        "compare with the application's records: writes in the gap are lost",
        value="paused until the old master was a replica" if done.unbroken else "a gap before the old master followed",
    )
    report.fact("acknowledged writes lost", "0 (proven)" if done.lost_nothing else value)
    report.loses(Loss(PART) if done.lost_nothing else Loss.not_known(PART, value))


def report_unplanned_loss(report: Report, done: HandOver | None, new: GroupMember, before: Before) -> None:
    """Bound the loss: the dead master cannot be queried."""
    if done:
        _report_ledger(report, done)
    report.loses(before.loss_with(new))
    seen = before.seen
    if seen is None or new.earlier_replid != seen.replid:
        report.warn(
            "acknowledged writes lost",
            "compare with the application's records; the old master logs its offset when it starts again",
            value="not measured: no Sentinel kept the master's last INFO",
        )
        return
    certain = max(0, seen.offset - new.promoted_at)
    window = max(0.0, before.died - seen.at)
    arrived = max(0, new.promoted_at - seen.offset)
    likely = max(seen.operations_per_second * window, arrived / SHORTEST_WRITE_BYTES)
    most = math.ceil(certain / SHORTEST_WRITE_BYTES + likely) + 1
    safe = datetime.fromtimestamp(seen.at, UTC).isoformat(timespec="milliseconds")
    report.fact("last known offset of the old master", f"{seen.offset:,} at {safe}")
    report.fact("offset of the new master when promoted", f"{new.promoted_at:,}")
    if certain:
        hint = "compare with the application's records"
        report.warn("acknowledged writes certainly lost", hint, value=f"{certain:,} bytes of the stream")
    else:
        report.fact("no acknowledged write lost before", safe)
    report.fact("acknowledged writes lost, at most, at the last known load", f"{most:,}")
    report.warn(
        "acknowledged writes that may be lost",
        "compare with the application's records of that time; the old master has them until it follows",
        value=f"{'some of those before, and ' if certain else ''}those acknowledged after {safe}, in the "
        f"{window:.1f} s until the master's death: not bounded, as its load then is unknown; "
        f"at most {most:,} at the last known load",
    )


def interrupted_loss(
    marker: RedisFailoverMarker, left: GroupMember | None, new: GroupMember, planned: Loss | None = None
) -> Loss:
    """The writes that the old master took after the pause of a killed run, in bytes of the stream (with the Sentinels'
    own): they are lost when it follows.

    A replica that continued the new master's stream without a full resynchronisation had no other writes.
    """
    known = marker.replid if new.earlier_replid == marker.replid else "unknown"
    if left and left.is_master and left.replid == known:
        lost = max(0, left.offset - new.promoted_at)
    elif left and left.earlier_replid == known:
        lost = max(0, left.promoted_at - new.promoted_at)
    else:
        why = (
            f"writes on {marker.old} resumed {LONGEST_SECONDS:.0f} s after the death of the run that began at "
            f"{marker.started}, and nobody read its offset before it followed"
        )
        return Loss.not_known(PART, why)
    return Loss(PART, lost, "byte", later=max(lost - (planned.count or 0), 0) if planned else 0)


def report_interrupted_loss(
    report: Report, marker: RedisFailoverMarker, left: GroupMember | None, new: GroupMember
) -> None:
    """Report what a killed run's second master had alone."""
    loss = interrupted_loss(marker, left, new)
    report.loses(loss)
    if loss.is_none:
        report.fact("acknowledged writes lost", f"0 (proven): {marker.old} had nothing that {new.address} lacks")
        return
    hint = "compare with the application's records of the time since the killed run"
    report.warn("acknowledged writes lost, at most", hint, value=loss.text)


def _report_ledger(report: Report, done: HandOver) -> None:
    account = done.account
    servers = dict.fromkeys([done.old, done.new.address, *(entry.server for entry in account.entries)])
    lost = {server: sum(entry.number in account.missing for entry in account.on(server)) for server in servers}
    rows = [
        (server, len(found := account.on(server)), found[-1].number if found else "", len(found) - lost[server])
        for server in servers
    ]
    columns = ("acknowledged by", "writes", "last number", f"present on {done.new.address}")
    report.table("Acknowledged test writes of this run", columns, rows)
    report.require(
        "acknowledged test writes of this run",
        not account.missing,
        "compare with the application's records: its writes are lost in proportion",
        value=f"{len(account.entries) - len(account.missing):,} of {len(account.entries):,} present",
        expected="all",
    )
