"""What a Redis failover proves and counts afterwards (§8.3): who is master, who follows, which writes are lost."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from blocks.redis import Redis
from flows.recovery.failover_findings import tell_servers
from runbook.errors import Unreachable
from runbook.report import Report, Status
from runbook.wait import until
from tasks.redis.failover.group import Group, LastSeen, Member, ask_group, read_group, read_last_seen
from tasks.redis.failover.promotion import HandOver, wait_in_sync
from tasks.redis.sentinels import ask_sentinels

FOLLOW_SECONDS = 60.0
SETTLE_SECONDS = 10.0
# INCR of a key of one letter, in the replication stream.
SHORTEST_WRITE_BYTES = 21


@dataclass(frozen=True)
class Before:
    """What was known of the dead master when the run began: its last INFO that a Sentinel has kept, and when a replica
    heard of it last (this host's clock, seconds; rather too late)."""

    seen: LastSeen | None
    heard: float

    @classmethod
    def read(cls, block: Redis, group: Group) -> Before:
        """Early: a failover that ends takes the Sentinels' memory with it."""
        silent = [m.silent_seconds for m in group.others if not m.problem and not m.is_master]
        return cls(read_last_seen(block, group.watch), time.time() - min(silent, default=0))


def settled(block: Redis, group: Group) -> Group:
    """A dead master is seen as dead by the Sentinels only after their down-after time, and a failover that is under way
    ends by itself: wait for that, reading only. What does not settle in time is returned as it is."""

    def unsettled(now: Group) -> bool:
        if not now.watch.answering or (now.watch.master and now.master and not now.master.dead):
            return False
        if any(member.is_master for member in now.others):  # it was promoted, and the Sentinels do not name it yet
            return True
        quorum = max(view.quorum for view in now.watch.answering)
        seen = [view for view in now.watch.answering if view.sees_down]
        return len(now.watch.masters) > 1 or len(seen) < quorum or not any("o_down" in view.flags for view in seen)

    if not unsettled(group):
        return group
    waits = [view.settings.get("down-after-milliseconds", 30_000) / 1000 for view in group.watch.answering]
    last = [group]

    def ready() -> bool:
        last[0] = ask_group(block)
        return not unsettled(last[0])

    with contextlib.suppress(Unreachable):
        until(ready, what="a verdict of the Sentinels", seconds=max(waits, default=0) + SETTLE_SECONDS)
    return last[0]


def tell_phases(report: Report, decision_seconds: float, done: HandOver) -> None:
    """Decision, switch and first acknowledged write apart."""
    write = max(0.0, done.first_write_seconds - done.switch_seconds)
    together = max(done.first_write_seconds, done.switch_seconds)
    report.fact("master", f"{done.new.address} (was {done.old}), {done.how}")
    report.fact("decision", f"{decision_seconds:.3f} s")
    report.fact("switch", f"{done.switch_seconds:.3f} s")
    report.fact("first acknowledged write", f"{write:.3f} s")
    report.fact("switch and first acknowledged write", f"{together:.3f} s")
    begun = "writes paused" if done.stood >= 0 else "a dead master acted upon"
    report.table(
        "Phases",
        ("phase", "seconds", "from", "to"),
        [
            ("decision", f"{decision_seconds:.3f}", "the run's start", begun),
            ("offsets equal", f"{done.caught_up_seconds:.3f}", begun, "all that may be promoted have every byte"),
            ("switch", f"{done.switch_seconds:.3f}", begun, f"{done.new.address} is a master"),
            ("first acknowledged write", f"{write:.3f}", "the switch", "a client that follows the Sentinels writes"),
            ("agreement", f"{done.agreed_seconds:.3f}", begun, "all Sentinels name it"),
        ],
    )


def tell_planned_loss(report: Report, done: HandOver) -> None:
    """What is proven of the acknowledged writes."""
    missing = done.missing_bytes
    _tell_ledger(report, done)
    told = {
        -1: "unknown: the new master does not continue the old one's stream",
        0: f"the old master stood at {done.stood:,}, the new one was promoted at {done.new.promoted_at:,}",
    }.get(missing, f"{missing:,} bytes of the stream are missing: {done.stood:,} against {done.new.promoted_at:,}")
    report.expect(
        "every acknowledged write is on the new master",
        missing == 0,
        f"what they were may still be read in the AOF of {done.old}; compare with the application's own records",
        value=told,
        expected="promoted with every byte",
    )
    report.expect(
        "no write between",
        done.unbroken,
        "the pause of writes had a gap before the old master followed: what clients wrote in it is lost",
        value="writes stood still from then until the old master was none" if done.unbroken else "there was a gap",
        otherwise=Status.WARN,
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
    window = max(0.0, before.heard - seen.at)
    arrived = max(0, new.promoted_at - seen.offset)
    most = math.ceil(max(seen.operations_per_second * window, arrived / SHORTEST_WRITE_BYTES)) + 1
    safe = datetime.fromtimestamp(seen.at, UTC).isoformat(timespec="milliseconds")
    report.fact("last known offset of the old master", f"{seen.offset:,} at {safe}")
    report.fact("offset of the new master when promoted", f"{new.promoted_at:,}")
    if certain:
        hint = "compare with the application's own records"
        report.warn("acknowledged writes lost for certain", hint, value=f"{certain:,} bytes of the stream")
    else:
        report.fact("every write is there that was acknowledged before", safe)
    report.fact("acknowledged writes lost, at most", f"{most:,}")
    report.warn(
        "acknowledged writes that may be lost",
        "compare with the application's own records of that time; the old master has them until it follows",
        value=f"those acknowledged after {safe}, in the {window:.1f} s until the master was last heard: at most about "
        f"{most:,}, as far as the load stayed what it was",
    )


def tell_stray(report: Report, left: Member, group: Group) -> None:
    """What an old master has taken after its replica was promoted: it goes when it follows."""
    master = group.master
    extra = left.offset - master.promoted_at if master and master.earlier_replid == left.replid else 0
    if left.is_master and extra:
        report.warn(
            "acknowledged writes lost, at most",
            "compare with the application's own records of the time since the run that died",
            value=f"{extra:,} bytes of the stream (its own PINGs too), taken by {left.address} as a second master",
        )


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
    report.expect(
        "this run's own acknowledged writes",
        not account.missing,
        "the application's are lost in proportion: compare with its own records",
        value=f"{len(account.entries) - len(account.missing):,} of {len(account.entries):,} are there",
        expected="all",
    )


def verify_after(report: Report, block: Redis, new: str, expected: list[str], down: list[str]) -> None:
    """All Sentinels name the new master, it is the only one, and all others that live follow it and are in sync."""
    started = time.monotonic()
    members = wait_in_sync(block, new, expected, FOLLOW_SECONDS)
    waited = time.monotonic() - started
    with contextlib.suppress(Unreachable):
        agreed = f"agreement on {new}"
        until(lambda: set(ask_sentinels(block).masters) == {new}, what=agreed, seconds=FOLLOW_SECONDS)
    group = read_group(block)
    tell_servers(report, "after", group)
    answering = group.watch.answering
    told = f"{sum(view.master == new for view in answering)} of {len(group.watch.views)}"
    report.expect(
        "the new master by all Sentinels",
        set(group.watch.masters) == {new} and len(answering) >= group.watch.majority,
        "wait some seconds and look again: SENTINEL GET-MASTER-ADDR-BY-NAME at each",
        value=told + "".join(f"; {view.address} does not answer" for view in group.watch.views if not view.answers),
        expected=new,
    )
    masters = [member.address for member in group.members.values() if member.is_master]
    report.expect(
        "one master",
        masters == [new],
        f"REPLICAOF {new.replace(':', ' ')} on the other: until then it takes writes that will be lost",
        value=", ".join(masters),
        expected=new,
    )
    behind = [f"{m.address}: {m.problem or m.role}" for m in members.values() if not _follows(m, group, new)]
    report.expect(
        "the others follow",
        not behind,
        "look at their logs (a full copy takes its time), then check again: INFO replication",
        value="; ".join(behind) or f"{len(members)} in sync after {waited:.1f} s",
        expected="in sync",
        otherwise=Status.WARN,
    )
    if down:
        report.warn(
            "servers that are down",
            f"start them: the Sentinels make them follow {new} about ten seconds later; one that was frozen takes "
            "writes of its old clients until then, which are lost",
            value=", ".join(down),
        )


def _follows(member: Member, group: Group, new: str) -> bool:
    now, master = group.members.get(member.address, member), group.members.get(new)
    return bool(master and not now.is_master and now.link_up and now.replid == master.replid)
