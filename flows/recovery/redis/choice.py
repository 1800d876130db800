"""Whom a Redis failover promotes (§8.3): every replica is judged, and the Sentinels' own choice with it."""

from __future__ import annotations

from blocks.redis.server import Redis
from flows.recovery.redis.findings import Mode, link
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import size
from tasks.redis.failover.command import coordinates
from tasks.redis.failover.group import Group, Member
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import Choice
from tasks.redis.sentinels import Follower, SentinelView
from tasks.redis.server import family

LAG_BYTES = 16_000_000
LAG_SECONDS = 10
"""A replica that is further behind is not fit for a planned hand-over: writes would stand still for too long."""
_UNABLE = ("s_down", "o_down", "disconnected")


def choose(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, version: str = "") -> Choice:
    """Judge every replica, and pin whom the Sentinels would promote. `version`: a dead master's.

    Raises:
        RunbookFailed: no replica is fit, or they would promote another one; the report says which and why.
    """
    master = group.master
    assert master
    # Not the first, which most clients ask first: the one that is at it names the new master later than the others.
    view = max(reversed(group.watch.answering), key=lambda view: view.can_decide)
    version = version or master.version
    why = {m.address: _why_unfit(m, group.seen_by(view, m.address), master, mode, version) for m in group.others}
    tell_candidates(report, group, view, why)
    equals = _judge_replicas(report, view, why)
    if wanted:
        hint = f"give {wanted} the lowest priority of all (CONFIG SET replica-priority), wait 10 s, launch it again"
        report.require(
            "the new master that was asked for",
            equals == [wanted],
            hint if wanted in why else f"{wanted} is no replica that the Sentinels know: choose one of the table",
            value=f"the Sentinels would take one of {', '.join(equals)}",
            expected=wanted,
        )
        report.fail_if_critical()
    others = [other.address for other in group.watch.answering if other.address != view.address]
    return Choice(
        master.address,
        equals[0],
        master.replid,
        needed=tuple(equals),
        replicas=tuple(member.address for member in group.others if not member.problem),
        sentinels=(view.address, *others),
        majority=group.watch.majority,
        pause_seconds=_pause_seconds(group),
        coordinated=mode == "planned" and coordinates(block, view.address, master.version),
    )


def _judge_replicas(report: Report, view: SentinelView, why: dict[str, str]) -> list[str]:
    """Those that may be promoted, the likeliest first."""
    fit = [address for address, reason in why.items() if not reason]
    report.require(
        "a replica that is fit",
        bool(fit),
        "put right what is said of it" if why else "start a replica: REPLICAOF the master",
        value="; ".join(f"{address}: {reason or 'fit'}" for address, reason in why.items())
        or "the Sentinels know none",
        expected="one or more",
    )
    report.fail_if_critical()
    first = view.promotable[0] if view.promotable else None
    report.require(
        "the one that the Sentinels would promote",
        bool(first and first.address in fit),
        f"put it right, or CONFIG SET replica-priority 0 on it and wait 10 s; fit are: {', '.join(fit)}",
        value=f"{first.address}: {why.get(first.address) or 'fit'}" if first else "none, by what they last saw",
        expected="fit",
    )
    report.fail_if_critical()
    assert first
    return [found.address for found in view.promotable if found.priority == first.priority and found.address in fit]


def tell_candidates(report: Report, group: Group, view: SentinelView, why: dict[str, str]) -> None:
    """Every replica, and what speaks against it."""
    order = {found.address: str(place) for place, found in enumerate(view.promotable, 1)}
    rows = []
    for member in sorted(group.others, key=lambda member: order.get(member.address, "~")):
        reason = why.get(member.address, "")
        behind = group.master.offset - member.offset if group.master and not group.master.problem else 0
        cells = (member.offset, link(member), member.priority, f"{behind:,} B") if not member.problem else ("",) * 4
        rows.append((order.get(member.address, ""), member.address, *cells, member.version, reason or "fit"))
    columns = ("the Sentinels' order", "replica", "offset", "link", "priority", "behind", "version", "fit")
    report.table("Candidates", columns, rows)


def require_unchanged(choice: Choice, again: Choice) -> None:
    """What was planned still stands.

    Raises:
        OpsError: master or candidate are others now; nothing was touched.
    """
    if (again.master, again.replid) != (choice.master, choice.replid) or choice.candidate not in again.needed:
        raise OpsError(
            f"changed since it was judged: it was {choice.target}, it is {again.target}", "launch it again: a new plan"
        )


def _pause_seconds(group: Group) -> float:
    """Half of what the Sentinels wait before they take a master for dead."""
    waits = [view.settings.get("down-after-milliseconds", 30_000) / 1000 for view in group.watch.answering]
    return min(min(waits) / 2, LONGEST_SECONDS)


def _why_unfit(member: Member, seen: Follower | None, master: Member, mode: Mode, version: str) -> str:
    if member.problem:
        return f"disconnected: {member.problem}"
    if member.is_master:
        return "it says that it is a master itself: somebody has promoted it"
    if member.loading or member.syncing:
        return "it is still loading its data" if member.loading else "it is in the middle of a full copy"
    if not member.priority or (seen and not seen.priority):
        return "priority 0: it is never promoted (CONFIG SET replica-priority 100; Sentinels see it within 10 s)"
    if seen is None:
        return "the Sentinels do not know it"
    if flags := [flag for flag in _UNABLE if flag in seen.flags]:
        return f"the Sentinels see it as {', '.join(flags)}"
    if version and family(version) != family(member.version):
        return f"another version family: {member.version}, the master runs {version}"
    return _behind(member, master) if mode == "planned" else ""


def _behind(member: Member, master: Member) -> str:
    if not member.link_up:
        return f"its link to the master is down for {member.silent_seconds} s"
    if member.replid != master.replid:
        return f"it follows another stream (of {member.follows})"
    behind, seconds = master.offset - member.offset, master.lags.get(member.address, member.silent_seconds)
    if behind > LAG_BYTES or seconds > LAG_SECONDS:
        return f"it lags: {size(max(behind, 0))} behind, last heard of {seconds} s ago"
    return ""
