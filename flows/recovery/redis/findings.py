"""The checks before a Redis failover (§8.3): the Sentinels and the master."""

from __future__ import annotations

from typing import Literal

from runbook.next import Next
from runbook.report import Report, Status
from runbook.units import duration
from tasks.redis.failover.group import Group, GroupMember

Mode = Literal["planned", "unplanned"]
FIRST_PING_MILLISECONDS = 1000
"""A Sentinel pings a newly discovered server after this time, and counts from its discovery."""


def judge_sentinels(report: Report, group: Group, mode: Mode, detached: str = "") -> None:
    """They answer, agree, have a majority, and will not see the new master as down. `detached`: since when an
    unfinished restore has detached the replicas and Sentinels; "" without one.

    Raises:
        RunbookFailed: one of these does not hold.
    """
    watch = group.watch
    silent = [view for view in watch.views if not view.answers]
    report.require(
        "answering Sentinels",
        not silent,
        "start those that do not answer, or remove them from [redis] sentinels",
        value=f"{len(watch.answering)} of {len(watch.views)}"
        + "".join(f"; {view.address} does not answer: {view.problem}" for view in silent),
        expected="all",
        worst=Status.WARN if watch.answering else Status.CRITICAL,
    )
    if not watch.answering:
        report.fail_if_critical()
    report.require(
        "one master in all Sentinels",
        bool(watch.master),
        f"attach them again: a restore detached them ({detached}) and did not finish"
        if detached
        else "wait some seconds for the end of a failover. Then SENTINEL RESET those that are still wrong, SENTINEL "
        "MONITOR on those that monitor none, and run it again",
        value=watch.describe(),
        expected="the same in all",
        follow=[Next("reattach-redis", "attach the Sentinels")] if detached else (),
    )
    undecided = [view.address for view in watch.answering if not view.can_decide]
    report.require(
        "quorum and majority",
        not undecided and len(watch.answering) >= watch.majority,
        "start the missing Sentinels: a failover needs their majority",
        value=f"{len(watch.answering)} answer"
        + (f"; SENTINEL CKQUORUM fails at {', '.join(undecided)}" if undecided else ""),
        expected=f"≥ {watch.majority}, and SENTINEL CKQUORUM ok at each",
    )
    _judge_down_after(report, group, mode)
    report.fail_if_critical()


def _judge_down_after(report: Report, group: Group, mode: Mode) -> None:
    short = {
        view.address: view.settings.get("down-after-milliseconds", 0) for view in group.watch.answering if view.master
    }
    report.require(
        "down-after-milliseconds",
        all(milliseconds > FIRST_PING_MILLISECONDS for milliseconds in short.values()),
        "SENTINEL SET the master's name down-after-milliseconds 5000 on each. With less, they see a new master as down "
        "before their first ping, and fail over again: that loses acknowledged writes",
        value=", ".join(f"{milliseconds:,} ms at {address}" for address, milliseconds in short.items()),
        expected=f"> {FIRST_PING_MILLISECONDS:,} ms",
        worst=Status.CRITICAL if mode == "planned" else Status.WARN,
    )


def judge_living(report: Report, group: Group) -> None:
    """For a planned failover: the master answers, is the only one, and no failover is in progress.

    Raises:
        RunbookFailed: one of these does not hold.
    """
    master = group.master
    assert master
    down = [view.address for view in group.watch.answering if view.sees_down]
    hint = "run it with mode=unplanned" if master.dead and down else "check the network between it and this host"
    report.require(
        f"the master {master.address} answers",
        not master.problem,
        hint if master.dead else master.hint,
        value=master.problem or master.version,
    )
    report.fail_if_critical()
    busy = [view.address for view in group.watch.answering if view.in_progress]
    report.require(
        "no failover in progress", not busy, "wait until it ends", value=", ".join(busy) or "none", expected="none"
    )
    masters = [member.address for member in group.members.values() if member.is_master]
    report.require(
        "one master",
        masters == [master.address] and not master.loading,
        "wait some seconds: the Sentinels make the other one a replica. Otherwise run REPLICAOF on it. The writes "
        "that it took are lost",
        value=", ".join(masters) or "none",
        expected=master.address,
    )
    if down:
        report.warn("master as the Sentinels see it", "check its load", value=f"down at {', '.join(down)}")


def judge_dead(report: Report, group: Group) -> None:
    """For an unplanned failover: neither this host nor a quorum of the Sentinels reaches the master.

    Raises:
        RunbookFailed: it answers, or no quorum sees it as down.
    """
    master, watch = group.master, group.watch
    assert master
    report.require(
        f"the master {master.address} is dead from this host",
        master.dead,
        "run it with mode=planned: the master answers, and a second one would be a split brain"
        if not master.problem or not master.hint
        else master.hint,
        value=master.problem or f"it answers as {master.role or 'a server'} with offset {master.offset:,}",
        expected="no answer",
    )
    down = [view for view in watch.answering if view.sees_down]
    agreed = any("o_down" in view.flags or view.in_progress for view in down)
    quorum = max(view.quorum for view in watch.answering)
    report.require(
        "the master is dead for a quorum of the Sentinels",
        len(down) >= quorum and agreed,
        "check the network between it and this host: the Sentinels still reach it, and one observer is not enough",
        value=f"down for {len(down)} of {len(watch.answering)}" + (", objectively (o_down)" if agreed else ""),
        expected=f"≥ {quorum}, and o_down",
    )
    report.fail_if_critical()


def report_servers(report: Report, title: str, group: Group) -> None:
    """Tables of every server's own state, and of every Sentinel's view."""
    rows = [
        (m.address, m.problem or m.role, m.offset if not m.problem else "", m.follows, link(m), m.version)
        for m in group.members.values()
    ]
    report.table(f"Servers {title}", ("server", "role", "offset", "follows", "link", "version"), rows)
    report.table(
        f"Sentinels {title}",
        ("Sentinel", "master", "flags", "quorum", "other Sentinels", "has majority"),
        [
            (v.address, v.master or v.problem or "none", ", ".join(sorted(v.flags)), v.quorum, v.others, v.can_decide)
            for v in group.watch.views
        ],
    )


def link(member: GroupMember) -> str:
    """A replica's connection to its master, as text."""
    if member.problem or member.is_master:
        return ""
    seconds = duration(member.silent_seconds)
    return f"up, last contact {seconds} ago" if member.link_up else f"down for {seconds}"
