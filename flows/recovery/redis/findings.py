"""What a Redis failover judges before it begins (§8.3): the Sentinels and the master."""

from __future__ import annotations

from typing import Literal

from runbook.report import Report, Status
from runbook.units import duration
from tasks.redis.failover.group import Group, Member

Mode = Literal["planned", "unplanned"]
FIRST_PING_MILLISECONDS = 1000
"""A Sentinel pings a server that it has just come to know after this time, and counts from the beginning."""


def judge_sentinels(report: Report, group: Group, mode: Mode, taken_off: str = "") -> None:
    """They answer, agree, are enough to decide, and will not take the new master for down. `taken_off`: since when a
    restore keeps the replicas and Sentinels off, "" where none does.

    Raises:
        RunbookFailed: not so.
    """
    watch = group.watch
    silent = [view for view in watch.views if not view.answers]
    report.require(
        "Sentinels that answer",
        not silent,
        "start those that do not answer, or take them out of [redis] sentinels",
        value=f"{len(watch.answering)} of {len(watch.views)}"
        + "".join(f"; {view.address} does not: {view.problem}" for view in silent),
        expected="all",
        worst=Status.WARN if watch.answering else Status.CRITICAL,
    )
    if not watch.answering:
        report.fail_if_critical()
    report.require(
        "one master by all Sentinels",
        bool(watch.master),
        f"a restore took them off ({taken_off}) and did not put them back: launch reattach-redis"
        if taken_off
        else "wait until a failover has ended (seconds); SENTINEL RESET on those that stay wrong, SENTINEL MONITOR on "
        "those that watch none; then launch it again",
        value=watch.describe(),
        expected="the same from all",
    )
    undecided = [view.address for view in watch.answering if not view.can_decide]
    report.require(
        "quorum and majority",
        not undecided and len(watch.answering) >= watch.majority,
        "start the missing Sentinels: without a majority nobody may fail over, and nobody would follow it",
        value=f"{len(watch.answering)} answer"
        + (f"; SENTINEL CKQUORUM fails at {', '.join(undecided)}" if undecided else ""),
        expected=f"{watch.majority} or more, and SENTINEL CKQUORUM ok at each",
    )
    short = {view.address: view.settings.get("down-after-milliseconds", 0) for view in watch.answering if view.master}
    report.require(
        "down-after-milliseconds",
        all(milliseconds > FIRST_PING_MILLISECONDS for milliseconds in short.values()),
        "SENTINEL SET the master's name down-after-milliseconds 5000, on each: with so little they take a new master "
        "for down before they ping it first, and fail over again, which loses acknowledged writes",
        value=", ".join(f"{milliseconds:,} at {address}" for address, milliseconds in short.items()),
        expected=f"more than {FIRST_PING_MILLISECONDS:,}",
        worst=Status.CRITICAL if mode == "planned" else Status.WARN,
    )
    report.fail_if_critical()


def judge_living(report: Report, group: Group) -> None:
    """A planned hand-over: the master lives, is the only one, and nobody has begun yet.

    Raises:
        RunbookFailed: not so.
    """
    master = group.master
    assert master
    down = [view.address for view in group.watch.answering if view.sees_down]
    hint = "launch it with mode=unplanned" if master.dead and down else "look at the network between it and this host"
    report.require(
        f"the master {master.address} answers",
        not master.problem,
        hint if master.dead else master.hint,
        value=master.problem or master.version,
    )
    report.fail_if_critical()
    busy = [view.address for view in group.watch.answering if view.in_progress]
    told = ", ".join(busy) or "none"
    report.require("no failover is under way", not busy, "wait until it has ended", value=told, expected="none")
    masters = [member.address for member in group.members.values() if member.is_master]
    report.require(
        "one server says that it is the master",
        masters == [master.address] and not master.loading,
        "the Sentinels make a stray one a replica within seconds: wait; else REPLICAOF it by hand. Writes that it took "
        "are lost then",
        value=", ".join(masters) or "none",
        expected=master.address,
    )
    if down:
        report.warn("the master in the Sentinels' eyes", "look at its load", value=f"down by {', '.join(down)}")


def judge_dead(report: Report, group: Group) -> None:
    """An unplanned one: nobody reaches the master, neither this host nor a quorum of the Sentinels.

    Raises:
        RunbookFailed: it lives, or not enough see it dead.
    """
    master, watch = group.master, group.watch
    assert master
    report.require(
        f"the master {master.address} is dead from here",
        master.dead,
        "it lives: a second master beside it would be a split brain. Launch it with mode=planned"
        if not master.problem or not master.hint
        else master.hint,
        value=master.problem or f"it answers, and says it is a {master.role or 'server'} with offset {master.offset:,}",
        expected="no answer",
    )
    down = [view for view in watch.answering if view.sees_down]
    agreed = any("o_down" in view.flags or view.in_progress for view in down)
    quorum = max(view.quorum for view in watch.answering)
    report.require(
        "the master is dead for a quorum of the Sentinels",
        len(down) >= quorum and agreed,
        "the Sentinels still reach it: look at the network between it and this host; never fail over on one opinion",
        value=f"down for {len(down)} of {len(watch.answering)}" + (", objectively (o_down)" if agreed else ""),
        expected=f"{quorum} or more, and o_down",
    )
    report.fail_if_critical()


def tell_servers(report: Report, title: str, group: Group) -> None:
    """What each server says of itself, and each Sentinel of the master."""
    rows = [
        (m.address, m.problem or m.role, m.offset if not m.problem else "", m.follows, link(m), m.version)
        for m in group.members.values()
    ]
    report.table(f"Servers {title}", ("server", "role", "offset", "follows", "link", "version"), rows)
    report.table(
        f"Sentinels {title}",
        ("Sentinel", "master", "flags", "quorum", "others known", "can decide"),
        [
            (v.address, v.master or v.problem or "none", ", ".join(sorted(v.flags)), v.quorum, v.others, v.can_decide)
            for v in group.watch.views
        ],
    )


def link(member: Member) -> str:
    """A replica's connection to its master, for people."""
    if member.problem or member.is_master:
        return ""
    return f"{'up, heard' if member.link_up else 'down since'} {duration(member.silent_seconds)} ago"
