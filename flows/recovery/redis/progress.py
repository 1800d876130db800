"""What a Redis failover waits for and proves (§8.3): who is dead, who is master, who follows."""

from __future__ import annotations

import contextlib
import time

from blocks.redis.server import Redis
from flows.recovery.redis.findings import tell_servers
from runbook.errors import Unreachable
from runbook.report import Report
from runbook.wait import until
from tasks.redis.failover.group import Group, Member, ask_group, read_group
from tasks.redis.failover.promotion import HandOver, wait_in_sync
from tasks.redis.sentinels import ask_sentinels

FOLLOW_SECONDS = 60.0
SETTLE_SECONDS = 10.0


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
    report.require(
        "the new master by all Sentinels",
        set(group.watch.masters) == {new} and len(answering) >= group.watch.majority,
        "wait some seconds and look again: SENTINEL GET-MASTER-ADDR-BY-NAME at each",
        value=told + "".join(f"; {view.address} does not answer" for view in group.watch.views if not view.answers),
        expected=new,
    )
    masters = [member.address for member in group.members.values() if member.is_master]
    report.require(
        "one master",
        masters == [new],
        f"REPLICAOF {new.replace(':', ' ')} on the other: until then it takes writes that will be lost",
        value=", ".join(masters),
        expected=new,
    )
    behind = [f"{m.address}: {m.problem or m.role}" for m in members.values() if not _follows(m, group, new)]
    report.prefer(
        "the others follow",
        not behind,
        "look at their logs (a full copy takes its time), then check again: INFO replication",
        value="; ".join(behind) or f"{len(members)} in sync after {waited:.1f} s",
        expected="in sync",
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
