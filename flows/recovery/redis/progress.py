"""The waits and the proof of a Redis failover (§8.3): which server is dead, which is master, which ones follow."""

from __future__ import annotations

import contextlib
import time

from blocks.redis.server import Redis
from flows.recovery.redis.findings import report_servers
from runbook.errors import Unreachable
from runbook.report import Report
from runbook.wait import until
from tasks.redis.failover.group import Group, GroupMember, ask_group, read_group
from tasks.redis.failover.promotion import HandOver, wait_in_sync
from tasks.redis.sentinels import ask_sentinels

FOLLOW_SECONDS = 60.0
SETTLE_SECONDS = 10.0


def settled(block: Redis, group: Group) -> Group:
    """Wait until the Sentinels see a dead master as down (down-after-milliseconds), and a failover in progress ends. It
    only reads; after a timeout it returns the last state."""

    def unsettled(now: Group) -> bool:
        if not now.watch.answering or (now.watch.master and now.master and not now.master.dead):
            return False
        if any(member.is_master for member in now.others):  # promoted, but the Sentinels do not name it yet
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
        until(ready, what="an agreement of the Sentinels", seconds=max(waits, default=0) + SETTLE_SECONDS)
    return last[0]


def report_phases(report: Report, decision_seconds: float, done: HandOver) -> None:
    """Report the seconds of decision, switch and first acknowledged write."""
    write = max(0.0, done.first_write_seconds - done.switch_seconds)
    together = max(done.first_write_seconds, done.switch_seconds)
    report.fact("master", f"{done.new.address} (before: {done.old}), {done.how}")
    report.fact("decision", f"{decision_seconds:.3f} s")
    report.fact("switch", f"{done.switch_seconds:.3f} s")
    report.fact("first acknowledged write", f"{write:.3f} s")
    report.fact("switch and first acknowledged write", f"{together:.3f} s")
    start = "writes paused" if done.stood >= 0 else "action on the dead master"
    report.table(
        "Phases",
        ("phase", "seconds", "from", "to"),
        [
            ("decision", f"{decision_seconds:.3f}", "the run's start", start),
            ("offsets equal", f"{done.caught_up_seconds:.3f}", start, "all candidates have every byte"),
            ("switch", f"{done.switch_seconds:.3f}", start, f"{done.new.address} is a master"),
            ("first acknowledged write", f"{write:.3f}", "the switch", "a Sentinel client writes"),
            ("agreement", f"{done.agreed_seconds:.3f}", start, "all Sentinels name it"),
        ],
    )


def verify_after(report: Report, block: Redis, new: str, expected: list[str], down: list[str]) -> None:
    """Prove that all Sentinels name the new master, that it is the only one, and that the running others follow it."""
    started = time.monotonic()
    members = wait_in_sync(block, new, expected, FOLLOW_SECONDS)
    waited = time.monotonic() - started
    with contextlib.suppress(Unreachable):
        agreed = f"agreement on {new}"
        until(lambda: set(ask_sentinels(block).masters) == {new}, what=agreed, seconds=FOLLOW_SECONDS)
    group = read_group(block)
    report_servers(report, "after", group)
    answering = group.watch.answering
    agreeing = f"{sum(view.master == new for view in answering)} of {len(group.watch.views)}"
    report.require(
        "new master in all Sentinels",
        set(group.watch.masters) == {new} and len(answering) >= group.watch.majority,
        "wait some seconds, then SENTINEL GET-MASTER-ADDR-BY-NAME at each",
        value=agreeing + "".join(f"; {view.address} does not answer" for view in group.watch.views if not view.answers),
        expected=new,
    )
    masters = [member.address for member in group.members.values() if member.is_master]
    report.require(
        "one master",
        masters == [new],
        f"run REPLICAOF {new.replace(':', ' ')} on the other: until then it takes writes that will be lost",
        value=", ".join(masters),
        expected=new,
    )
    behind = [f"{m.address}: {m.problem or m.role}" for m in members.values() if not _follows(m, group, new)]
    report.prefer(
        "replicas follow",
        not behind,
        "check their logs and INFO replication: a full resynchronisation takes time",
        value="; ".join(behind) or f"{len(members)} in sync after {waited:.1f} s",
        expected="in sync",
    )
    if down:
        report.warn(
            "servers that are down",
            f"start them: the Sentinels make them follow {new} after about 10 s. A frozen master takes writes of its "
            "old clients until then, and they are lost",
            value=", ".join(down),
        )


def _follows(member: GroupMember, group: Group, new: str) -> bool:
    now, master = group.members.get(member.address, member), group.members.get(new)
    return bool(master and not now.is_master and now.link_up and now.replid == master.replid)
