"""Recovery points beyond a backup's time: a Redis replica, and files unchanged since their backup (§8.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from blocks.environment import Environment
from blocks.places import Application
from blocks.redis.server import Redis
from runbook import clock
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.units import size
from tasks.application.files import directory_of
from tasks.backups.entries import walk
from tasks.recovery_points.point import Point, best_of
from tasks.redis.failover.group import GroupMember, ask_group, read_member
from tasks.redis.position import StreamPosition, known_positions, received, received_until


@probe
def read_replica_point(env: Environment) -> Point | None:
    """The point of a failover to the most advanced replica; None without one."""
    master, others = _servers(env.redis)
    asked = clock.now()
    if not others:
        return None
    known = known_positions(env.redis, env.reports_directory)
    points = [_replica(master, one, asked, known) for one in others]
    return best_of(points) or points[0]


def _servers(block: Redis) -> tuple[GroupMember | None, Sequence[GroupMember]]:
    """The master and its replicas, from the Sentinels or the environment."""
    if block.sentinels:
        group = ask_group(block)
        if group.watch.answering:
            return group.master, group.others
    addresses = [block.address, *block.replicas]
    with ThreadPoolExecutor(len(addresses)) as beside:
        found = list(beside.map(lambda address: read_member(block, address), addresses))
    return found[0], found[1:]


def _replica(
    master: GroupMember | None, member: GroupMember, asked: datetime, known: Sequence[StreamPosition]
) -> Point:
    point = Point("redis", "replica", "live", member.address, hint="check its log, and start it")
    if member.problem or member.is_master or member.loading or member.syncing:
        busy = "it is loading its data, or in a full resynchronisation"
        why = member.problem or ("it is a master itself" if member.is_master else busy)
        return replace(point, problem=why)
    if master is None or master.problem or not member.link_up:
        # The end of its link shows nothing: it can have hung before.
        dead = "the master does not answer"
        why = dead if master is None or master.problem else f"its link has been down for {member.silent_seconds} s"
        at = received_until(received(member), known)
        problem = why if at is None or why != dead else ""
        hint = "redis-failover promotes it; no known offset of the master shows what it lacks" if at is None else ""
        return replace(
            point, at=at, exact=False, proven="answers", problem=problem, detail=why, hint=hint or point.hint
        )
    behind = max(master.offset - member.offset, 0)
    seconds = max(master.lags.get(member.address, 0), 1) if behind else 0
    detail = f"{size(behind)} behind" if behind else "has everything"
    return replace(point, at=_before(asked, seconds), proven="answers", hint="", detail=detail)


def _before(moment: datetime, seconds: float) -> datetime:
    return moment - timedelta(seconds=seconds)


@probe
def read_unchanged(application: Application) -> tuple[datetime, datetime | None]:
    """The time of the check, and the last change in the application's directory; None where it cannot be read."""
    asked = clock.now()
    try:
        directory = directory_of(application)
        newest = max(os.lstat(path).st_ctime for path in (directory, *walk(directory)))
    except (OpsError, OSError, ValueError):
        return asked, None
    return asked, datetime.fromtimestamp(newest, UTC)


def unchanged_since(points: Sequence[Point], asked: datetime, changed: datetime | None) -> list[Point]:
    """A backup of unchanged files loses nothing, whatever its age."""
    return [
        replace(
            point, at=asked, every_seconds=0.0, detail=f"of {clock.text(point.at, 'minutes')}, nothing changed since"
        )
        if changed and point.at and changed < point.at
        else point
        for point in points
    ]
