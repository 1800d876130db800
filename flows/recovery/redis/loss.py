"""Which acknowledged writes a Redis failover has lost, or may have (§8.3)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from blocks.redis.server import Redis
from runbook.report import Report
from tasks.redis.failover.group import Group, LastSeen, Member, read_last_seen
from tasks.redis.failover.ledger import RedisFailoverMarker
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import HandOver

# INCR of a key of one letter, in the replication stream.
SHORTEST_WRITE_BYTES = 21


@dataclass(frozen=True)
class Before:
    """What was known of the dead master when the run began: its last INFO that a Sentinel has kept, and when it died at
    the latest (this host's clock, seconds)."""

    seen: LastSeen | None
    died: float

    @classmethod
    def read(cls, block: Redis, group: Group) -> Before:
        """Early: a failover that ends takes the Sentinels' memory with it."""
        silent = [m.silent_seconds for m in group.others if not m.problem and not m.is_master]
        down_after = "down-after-milliseconds"
        # A Sentinel sees it as down so long after the first PING that was not answered; a replica whose link was cut
        # before knows nothing of the time between.
        unanswered = [v.down_seconds + v.settings.get(down_after, 0) / 1000 for v in group.watch.views if v.sees_down]
        now = time.time()
        return cls(read_last_seen(block, group.watch), now - min(min(silent, default=0), min(unanswered, default=0)))


def tell_planned_loss(report: Report, done: HandOver) -> None:
    """What is proven of the acknowledged writes."""
    missing = done.missing_bytes
    _tell_ledger(report, done)
    told = {
        -1: "unknown: the new master does not continue the old one's stream",
        0: f"the old master stood at {done.stood:,}, the new one was promoted at {done.new.promoted_at:,}",
    }.get(missing, f"{missing:,} bytes of the stream are missing: {done.stood:,} against {done.new.promoted_at:,}")
    report.require(
        "every acknowledged write is on the new master",
        missing == 0,
        f"what they were may still be read in the AOF of {done.old}; compare with the application's own records",
        value=told,
        expected="promoted with every byte",
    )
    report.prefer(
        "no write between",
        done.unbroken,
        "the pause of writes had a gap before the old master followed: what clients wrote in it is lost",
        value="writes stood still from then until the old master was none" if done.unbroken else "there was a gap",
    )
    report.fact("acknowledged writes lost", "0 (proven)" if done.lost_nothing else told)


def tell_unplanned_loss(report: Report, done: HandOver | None, new: Member, before: Before) -> None:
    """What may be lost, as a bound: the dead master cannot be asked."""
    if done:
        _tell_ledger(report, done)
    seen = before.seen
    if seen is None or new.earlier_replid != seen.replid:
        report.warn(
            "acknowledged writes lost",
            "compare with the application's own records; the old master's offset is in its log when it comes back",
            value="not measured: no Sentinel has kept what the master last said",
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
        hint = "compare with the application's own records"
        report.warn("acknowledged writes lost for certain", hint, value=f"{certain:,} bytes of the stream")
    else:
        report.fact("every write is there that was acknowledged before", safe)
    report.fact("acknowledged writes lost, at most, at the load last seen", f"{most:,}")
    report.warn(
        "acknowledged writes that may be lost",
        "compare with the application's own records of that time; the old master has them until it follows",
        value=f"{'some of those before, and ' if certain else ''}those acknowledged after {safe}, in the "
        f"{window:.1f} s until the master's death: not bounded, as nobody saw its load then; "
        f"{most:,} at most at the load last seen",
    )


def tell_interrupted_loss(report: Report, marker: RedisFailoverMarker, left: Member | None, new: Member) -> None:
    """What the old master took after the pause of a killed run had ended: it goes when it follows.

    A replica that went on in the new master's stream without a full copy had nothing that the new one has not.
    """
    known = marker.replid if new.earlier_replid == marker.replid else "unknown"
    if left and left.is_master and left.replid == known:
        lost = max(0, left.offset - new.promoted_at)
        told = (
            f"{lost:,} bytes of the stream (the Sentinels' greetings too) that {left.address} took as a second master"
        )
    elif left and left.earlier_replid == known:
        lost = max(0, left.promoted_at - new.promoted_at)
        told = f"{lost:,} bytes of the stream"
    else:
        lost = -1
        told = (
            f"not measured: writes on {marker.old} went on {LONGEST_SECONDS:.0f} s after the death of the run that "
            f"began at {marker.started}; those are lost that it took from then until it followed"
        )
    if lost:
        hint = "compare with the application's own records of the time since the run that died"
        report.warn("acknowledged writes lost, at most", hint, value=told)
    else:
        report.fact("acknowledged writes lost", f"0 (proven): {marker.old} had nothing that {new.address} has not")


def _tell_ledger(report: Report, done: HandOver) -> None:
    account = done.account
    servers = dict.fromkeys([done.old, done.new.address, *(entry.server for entry in account.entries)])
    lost = {server: sum(entry.number in account.missing for entry in account.on(server)) for server in servers}
    rows = [
        (server, len(found := account.on(server)), found[-1].number if found else "", len(found) - lost[server])
        for server in servers
    ]
    columns = ("acknowledged by", "writes", "last number", f"there on {done.new.address}")
    report.table("Acknowledged writes of this run's own client", columns, rows)
    report.require(
        "this run's own acknowledged writes",
        not account.missing,
        "the application's are lost in proportion: compare with its own records",
        value=f"{len(account.entries) - len(account.missing):,} of {len(account.entries):,} are there",
        expected="all",
    )
