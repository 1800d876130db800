"""Pause and resume replay on a standby: it keeps the primary's content of that moment, and still receives WAL.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-RECOVERY-CONTROL
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.replication.synchronous import address

PAUSE, RESUME = "pause replay of", "resume replay of"
RUNNING, PAUSED = "not paused", "paused"
SECONDS = 30.0


@dataclass(frozen=True)
class Replaying:
    """The replay of a node. `state`: PostgreSQL's word, "" on a primary or if the node does not answer (`problem`).
    `at`: the LSN that it has replayed."""

    postgres: Postgres
    state: str
    at: str
    problem: str = ""

    @property
    def address(self) -> str:
        """`host:port`."""
        return address(self.postgres)


@probe
def read_replaying(nodes: Sequence[Postgres]) -> tuple[Replaying, ...]:
    """Query each node; one that does not answer is part of the result."""
    return tuple(_replaying(node) for node in nodes)


def _replaying(node: Postgres) -> Replaying:
    try:
        with node.connect() as connection:
            if not execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
                return Replaying(node, "", "")
            state, at = execute(connection, _STATE)[0]
    except (OpsError, psycopg.Error) as error:
        return Replaying(node, "", "", str(error))
    return Replaying(node, str(state), str(at))


_STATE = "SELECT pg_get_wal_replay_pause_state(), pg_last_wal_replay_lsn()"


@action(of=lambda node: Act(PAUSE, address(node)), idempotent=True)
def pause_replay(node: Postgres) -> str:
    """Returns the LSN at which replay is paused.

    Raises:
        Unreachable: the node does not answer, or does not pause.
        OpsError: it is not a standby any more.
    """
    return _switch(node, "SELECT pg_wal_replay_pause()", PAUSED)


@action(of=lambda node: Act(RESUME, address(node)), idempotent=True)
def resume_replay(node: Postgres) -> str:
    """Returns the LSN at which replay resumes."""
    return _switch(node, "SELECT pg_wal_replay_resume()", RUNNING)


def _switch(node: Postgres, statement: str, wanted: str) -> str:
    try:
        with node.connect() as connection:
            execute(connection, statement.encode())  # type: ignore[arg-type]
            until(
                lambda: execute(connection, _STATE)[0][0] == wanted,
                what=f"“{wanted}” of {address(node)}",
                seconds=SECONDS,
            )
            return str(execute(connection, _STATE)[0][1])
    except psycopg.errors.ObjectNotInPrerequisiteState:
        raise OpsError(f"{address(node)} is not a standby any more", "run this again: the node was promoted") from None
