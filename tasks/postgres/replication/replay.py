"""Pause and resume a standby's replay: a paused one keeps an earlier state and still receives WAL.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-RECOVERY-CONTROL
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.replication.synchronous import address

PAUSE, RESUME = "pause replay of", "resume replay of"
RUNNING, PAUSED = "not paused", "paused"
SECONDS = 30.0


@dataclass(frozen=True)
class Replaying:
    """A node and its replay state, in PostgreSQL's words; empty on a primary, or if it does not answer (`problem`).
    `at`: the replayed LSN."""

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
    """The state of each node; one that does not answer does not stop the others."""
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


@action(idempotent=True)
def pause_replay(permit: Permit, node: Postgres) -> str:
    """Pause the replay; returns the LSN at which it stops.

    Raises:
        Unreachable: it does not answer, or does not pause.
        OpsError: it is not a standby any more.
    """
    permit.require(PAUSE, address(node))
    return _turn(node, "SELECT pg_wal_replay_pause()", PAUSED)


@action(idempotent=True)
def resume_replay(permit: Permit, node: Postgres) -> str:
    """Resume the replay; returns the LSN at which it continues."""
    permit.require(RESUME, address(node))
    return _turn(node, "SELECT pg_wal_replay_resume()", RUNNING)


def _turn(node: Postgres, statement: str, wanted: str) -> str:
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
        hint = "launch this again: the standby was promoted"
        raise OpsError(f"{address(node)} is not a standby any more", hint) from None
