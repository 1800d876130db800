"""Positions in a replication stream: how far a master was, and when. They show what a replica has received.

The end of a replica's link shows nothing: a replica that hung loses its link only when the master dies.
https://valkey.io/topics/replication/
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files import record
from tasks.redis.failover.group import GroupMember, LastSeen, read_member

RECORD = "redis-position.json"
POSITION = "replication"
"""Of a backup's manifest: the master's position at its end."""


@dataclass(frozen=True)
class StreamPosition:
    """Every write that a master acknowledged by `at` is before `offset` of its replication stream `replid`."""

    replid: str
    offset: int
    at: datetime


def read_position(block: Redis, at: datetime | None = None) -> StreamPosition | None:
    """The position of a master now. `at`: an earlier time, for which it holds too. None: the server does not answer, or
    is no master."""
    asked = datetime.now(UTC)
    return position_of(read_member(block, block.address), at or asked)


def position_of(member: GroupMember, asked: datetime) -> StreamPosition | None:
    """The position of a master that was queried at `asked`."""
    is_known = not member.problem and member.is_master and bool(member.replid)
    return StreamPosition(member.replid, member.offset, asked) if is_known else None


def seen_position(seen: LastSeen) -> StreamPosition:
    """The position in the master's last INFO at a Sentinel."""
    return StreamPosition(seen.replid, seen.offset, datetime.fromtimestamp(seen.at, UTC))


def record_position(reports: Path, position: StreamPosition) -> None:
    """Keep the newest known position: after the master's death it cannot be queried.

    Raises:
        OpsError: it cannot be written.
    """
    record.write(reports / RECORD, position)


def recorded_position(reports: Path) -> StreamPosition | None:
    """The recorded position; None: there is none, or it is damaged."""
    try:
        return record.read(reports / RECORD, StreamPosition, "delete it")
    except OpsError:
        return None
