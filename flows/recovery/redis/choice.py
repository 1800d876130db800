"""The replica that a Redis failover promotes (§8.3): every replica is judged, and the Sentinels' choice."""

from __future__ import annotations

from blocks.redis.server import Redis
from flows.recovery.redis.findings import Mode, link
from runbook.errors import OpsError
from runbook.report import Report
from runbook.units import size
from tasks.redis.failover.command import coordinates
from tasks.redis.failover.group import Group, GroupMember
from tasks.redis.failover.pause import LONGEST_SECONDS
from tasks.redis.failover.promotion import PromotionChoice
from tasks.redis.sentinels import Follower, SentinelView
from tasks.redis.server import family

LAG_BYTES = 16_000_000
LAG_SECONDS = 10
"""A replica that lags more is unfit for a planned failover: writes would be paused for too long."""
_UNABLE = ("s_down", "o_down", "disconnected")


def choose(report: Report, block: Redis, group: Group, mode: Mode, wanted: str, version: str = "") -> PromotionChoice:
    """Judge every replica, and choose the one that the Sentinels would promote. `version`: a dead master's.

    Raises:
        RunbookFailed: no replica is fit, or the Sentinels would promote an unfit one.
    """
    master = group.master
    assert master
    # Not the first, which most clients query first: the Sentinel that fails over names the new master last.
    view = max(reversed(group.watch.answering), key=lambda view: view.can_decide)
    version = version or master.version
    why = {m.address: _why_unfit(m, group.seen_by(view, m.address), master, mode, version) for m in group.others}
    report_candidates(report, group, view, why)
    equals = _judge_replicas(report, view, why)
    if wanted:
        hint = f"set the lowest replica-priority on {wanted} (CONFIG SET), wait 10 s, then run it again"
        report.require(
            "new master as requested",
            equals == [wanted],
            hint if wanted in why else f"choose a replica from the table: the Sentinels do not know {wanted}",
            value=f"the Sentinels would promote one of {', '.join(equals)}",
            expected=wanted,
        )
        report.fail_if_critical()
    others = [other.address for other in group.watch.answering if other.address != view.address]
    return PromotionChoice(
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
    """The replicas that may be promoted, the most likely first."""
    fit = [address for address, reason in why.items() if not reason]
    report.require(
        "fit replica",
        bool(fit),
        "fix one of them" if why else "start a replica (REPLICAOF the master)",
        value="; ".join(f"{address}: {reason or 'fit'}" for address, reason in why.items())
        or "the Sentinels know no replica",
        expected="one or more",
    )
    report.fail_if_critical()
    first = view.promotable[0] if view.promotable else None
    report.require(
        "replica that the Sentinels would promote",
        bool(first and first.address in fit),
        f"fix it, or CONFIG SET replica-priority 0 on it and wait 10 s; fit replicas: {', '.join(fit)}",
        value=f"{first.address}: {why.get(first.address) or 'fit'}" if first else "none, by their last view",
        expected="fit",
    )
    report.fail_if_critical()
    assert first
    return [found.address for found in view.promotable if found.priority == first.priority and found.address in fit]


def report_candidates(report: Report, group: Group, view: SentinelView, why: dict[str, str]) -> None:
    """A table of every replica, and why it is unfit."""
    order = {found.address: str(place) for place, found in enumerate(view.promotable, 1)}
    rows = []
    for member in sorted(group.others, key=lambda member: order.get(member.address, "~")):
        reason = why.get(member.address, "")
        behind = group.master.offset - member.offset if group.master and not group.master.problem else 0
        cells = (member.offset, link(member), member.priority, f"{behind:,} B") if not member.problem else ("",) * 4
        rows.append((order.get(member.address, ""), member.address, *cells, member.version, reason or "fit"))
    columns = ("the Sentinels' order", "replica", "offset", "link", "priority", "behind", "version", "fit")
    report.table("Candidates", columns, rows)


def require_unchanged(choice: PromotionChoice, again: PromotionChoice) -> None:
    """Check that the plan still holds.

    Raises:
        OpsError: the master or the candidate changed; nothing was touched.
    """
    if (again.master, again.replid) != (choice.master, choice.replid) or choice.candidate not in again.needed:
        raise OpsError(
            f"changed since the plan: it was {choice.target}, it is {again.target}", "run it again for a new plan"
        )


def _pause_seconds(group: Group) -> float:
    """Half of the time after which the Sentinels see a master as down."""
    waits = [view.settings.get("down-after-milliseconds", 30_000) / 1000 for view in group.watch.answering]
    return min(min(waits) / 2, LONGEST_SECONDS)


def _why_unfit(member: GroupMember, seen: Follower | None, master: GroupMember, mode: Mode, version: str) -> str:
    if member.problem:
        return f"disconnected: {member.problem}"
    if member.is_master:
        return "it is a master itself: it was promoted"
    if member.loading or member.syncing:
        return "it is loading its data" if member.loading else "a full resynchronisation is running"
    if not member.priority or (seen and not seen.priority):
        return "priority 0: it is never promoted (CONFIG SET replica-priority 100; the Sentinels notice within 10 s)"
    if seen is None:
        return "the Sentinels do not know it"
    if flags := [flag for flag in _UNABLE if flag in seen.flags]:
        return f"the Sentinels see it as {', '.join(flags)}"
    if version and family(version) != family(member.version):
        return f"another version family: {member.version}; the master runs {version}"
    return _behind(member, master) if mode == "planned" else ""


def _behind(member: GroupMember, master: GroupMember) -> str:
    if not member.link_up:
        return f"its link to the master has been down for {member.silent_seconds} s"
    if member.replid != master.replid:
        return f"it follows another replication stream (of {member.follows})"
    behind, seconds = master.offset - member.offset, master.lags.get(member.address, member.silent_seconds)
    if behind > LAG_BYTES or seconds > LAG_SECONDS:
        return f"it lags: {size(max(behind, 0))} behind, last contact {seconds} s ago"
    return ""
