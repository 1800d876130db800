"""Which of an environment's PostgreSQL servers is the primary: asked when somebody needs it, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg

from blocks.hosts import is_here
from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError

ASK_SECONDS = 5
"""A server that is dead refuses at once; one on a busy host is not to be taken for it."""


@dataclass(frozen=True)
class NodeState:
    """What a server says of itself. `system` is its cluster's identifier; `timeline` is the one that it writes, 0 on a
    standby."""

    in_recovery: bool
    system: int
    timeline: int


def ask(node: Postgres) -> NodeState | None:
    """What a server says of itself now; None where it does not answer within `ASK_SECONDS`, or refuses."""
    try:
        with node.connect(seconds=ASK_SECONDS) as connection:
            in_recovery, system, timeline = execute(connection, _STANDING)[0]
    except (OpsError, psycopg.Error):
        return None
    return NodeState(bool(in_recovery), int(str(system)), int(str(timeline)))


# The timeline of the last checkpoint is the old one for some seconds after a promotion; that of the WAL never is.
_STANDING = """
SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
"""


def primary_first(nodes: Sequence[Postgres]) -> list[Postgres]:
    """The nodes, the primary first. A single one is not queried.

    Where all that answer are in recovery, the one that does not answer is the primary. Where nobody answers, the data
    directories on this host decide. Otherwise, or if all are in recovery: the order of the configuration.

    Raises:
        OpsError: two servers take writes. Which of them has the users' data only a person can say: choosing one would
            lose what the other has.
    """
    if len(nodes) < 2:
        return list(nodes)
    standings = [ask(node) for node in nodes]
    primaries = [(node, found) for node, found in zip(nodes, standings, strict=True) if found and not found.in_recovery]
    if len(primaries) > 1:
        raise OpsError(
            "two servers take writes: " + " and ".join(_described(node, found) for node, found in primaries),
            "find out which one the application writes to; stop the other's service, and see that nothing starts it "
            "again; then launch rejoin-standby, which saves what only that one has",
        )

    def rank(index: int) -> tuple[bool, bool, int]:
        standing = standings[index]
        by_files = 0 if any(standings) else _rank_by_files(nodes[index], nodes)
        return (bool(standing and not standing.in_recovery), standing is None and any(standings), by_files)

    return [nodes[index] for index in sorted(range(len(nodes)), key=rank, reverse=True)]


def files_of(node: Postgres) -> Literal["primary", "standby", "missing", "unknown"]:
    """Return what a node's data directory is, if it is on this host and can be read."""
    data = Path(node.data_directory)
    try:
        if not is_here(node.host) or not node.data_directory:
            return "unknown"
        if not (data / "PG_VERSION").exists():
            return "missing"
        return "standby" if (data / "standby.signal").exists() else "primary"
    except OSError:  # this user cannot read it
        return "unknown"


def _rank_by_files(node: Postgres, nodes: Sequence[Postgres]) -> int:
    """Rank a primary before a missing directory before a standby: a removed or half-replaced primary is missing, but so
    is a directory of which another host has the data."""
    files = [files_of(one) for one in nodes]
    missing = int("unknown" not in files)
    return {"primary": 2, "missing": missing, "standby": 0, "unknown": 0}[files_of(node)]


def _described(node: Postgres, found: NodeState) -> str:
    return f"{node.host}:{node.port} ({node.service}, timeline {found.timeline}, cluster {found.system})"
