"""The lab's two PostgreSQL servers, equal in everything. Which of them is the primary, their data directories say: a
server that follows has a `standby.signal` in it, and a promotion takes that away."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path

from lab.state.layout import Layout
from lab.state.state import LabState

_SEGMENT_SYSTEM = struct.Struct("<24xQ")
"""XLogLongPageHeaderData, with which every WAL segment begins: 24 bytes, then the system identifier."""


@dataclass(frozen=True)
class Node:
    """One of the two: its program's name under the supervisor, its port, its data directory and its configuration."""

    program: str
    port: int
    data: Path
    configuration: Path

    @property
    def exists(self) -> bool:
        """Whether there is a cluster."""
        return (self.data / "PG_VERSION").exists()

    @property
    def follows(self) -> bool:
        """Whether it starts as a standby."""
        return (self.data / "standby.signal").exists()

    @property
    def system(self) -> int:
        """The identifier of its cluster, which begins with the second of its initdb; 0 where there is none."""
        with contextlib.suppress(OSError):
            return int.from_bytes((self.data / "global" / "pg_control").read_bytes()[:8], "little")
        return 0

    @property
    def timeline(self) -> int:
        """The newest that it knows. A promotion writes the history of its own before anything else."""
        return max((int(path.stem, 16) for path in (self.data / "pg_wal").glob("*.history")), default=1)


def nodes(layout: Layout, state: LabState) -> tuple[Node, Node]:
    """Both, the one that is the primary of a new lab first."""
    return (
        Node("postgresql", state.ports.postgres, layout.postgres_data, layout.postgresql_conf),
        Node("postgresql-standby", state.ports.postgres_standby, layout.standby_data, layout.standby_conf),
    )


def primary_first(both: tuple[Node, Node]) -> tuple[Node, Node]:
    """The primary, or the node that it becomes when it starts, and the other one.

    Of two that would both start as a primary it is that of the newer cluster (a recovery made it in the place of the
    other), and of one cluster the one on the higher timeline: the other has not been rejoined since a failover.
    """
    able = [node for node in both if node.exists and not node.follows]
    chosen = max(able, key=lambda node: (node.system, node.timeline), default=both[0])
    return (chosen, both[0] if chosen is both[1] else both[1])


def system_of_wal(directory: Path) -> int:
    """The identifier of the cluster whose WAL is in a directory; 0 where there is none yet."""
    for path in sorted(directory.glob("[0-9A-F]" * 24 + "*"), reverse=True):
        with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
            if found := _SEGMENT_SYSTEM.unpack(file.read(_SEGMENT_SYSTEM.size))[0]:
                return int(found)
    return 0
