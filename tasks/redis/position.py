"""Positions in a replication stream: how far a master was, and when. They show what a replica has received.

The end of a replica's link shows nothing: a replica that hung loses its link only when the master dies.
https://valkey.io/topics/replication/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files import record
from runbook.kinds import action
from tasks.redis.failover.group import GroupMember, read_last_seen, read_member
from tasks.redis.sentinels import ask_sentinels, find_master

RECORD = "records/redis-positions.json"  # beside the reports, and none of them
MOST_STREAMS = 5
POSITION = "replication"
"""Of a backup's manifest: the master's position at its end."""


@dataclass(frozen=True)
class StreamPosition:
    """Every write that a master acknowledged by `at` is before `offset` of its replication stream `replid`."""

    replid: str
    offset: int
    at: datetime


@dataclass(frozen=True)
class _Positions:
    """The newest recorded position of each stream, the newest first."""

    positions: tuple[StreamPosition, ...] = ()


def read_position(block: Redis, at: datetime | None = None) -> StreamPosition | None:
    """The position of a master now. `at`: an earlier time, for which it holds too. None: the server does not answer, or
    is no master."""
    asked = datetime.now(UTC)
    return position_of(read_member(block, block.address), at or asked)


def position_of(member: GroupMember, asked: datetime) -> StreamPosition | None:
    """The position of a master that was queried at `asked`."""
    is_known = not member.problem and member.is_master and bool(member.replid)
    return StreamPosition(member.replid, member.offset, asked) if is_known else None


def received(member: GroupMember) -> dict[str, int]:
    """By stream, the offset up to which a server has the writes. It keeps the stream before its promotion."""
    earlier = {member.earlier_replid: member.promoted_at} if member.earlier_replid else {}
    return {**earlier, **({member.replid: member.offset} if member.replid else {})}


def received_until(streams: Mapping[str, int], known: Iterable[StreamPosition]) -> datetime | None:
    """Until when a server has every acknowledged write, by what it received; None: no known position shows it."""
    return max((one.at for one in known if streams.get(one.replid, -1) >= one.offset), default=None)


def known_positions(block: Redis, reports: Path) -> tuple[StreamPosition, ...]:
    """The positions of earlier masters: in the last INFO that a Sentinel keeps, and those recorded by checks."""
    seen = read_last_seen(block, ask_sentinels(block))
    found = [StreamPosition(seen.replid, seen.offset, datetime.fromtimestamp(seen.at, UTC))] if seen else []
    return (*found, *_recorded(reports))


@action(idempotent=True)
def keep_position(block: Redis, reports: Path) -> StreamPosition | None:
    """Record how far the master is: after its death it cannot be queried. None: none answers, or the Sentinels do not
    agree on it."""
    try:
        position = read_position(find_master(block))
        if position:
            record_position(reports, position)
    except OpsError:
        return None
    return position


def record_position(reports: Path, position: StreamPosition) -> None:
    """Keep the newest position of each stream.

    Raises:
        OpsError: it cannot be written.
    """
    others = (one for one in _recorded(reports) if one.replid != position.replid)
    record.write(reports / RECORD, _Positions((position, *others)[:MOST_STREAMS]))


def _recorded(reports: Path) -> tuple[StreamPosition, ...]:
    try:
        found = record.read(reports / RECORD, _Positions, "delete it")
    except OpsError:  # damaged: as if nothing was recorded
        return ()
    return found.positions if found else ()
