"""The promotion, and what the new primary needs at once: slots, the WAL receiver, commits that return.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-RECOVERY-CONTROL-TABLE
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from blocks.services.service import Services
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.failover.fencing import Fencing, fencing_of
from tasks.failover.member import ask_member
from tasks.host.services import start_one
from tasks.postgres.replication.synchronous import address, synchrony
from tasks.wal.format.names import Timeline

PROMOTE = "promote"
PROMOTE_SECONDS = 60
ATTACH_SECONDS = 20.0
"""A WAL receiver connects within a second of its start, or later on a busy host. Without it commits wait for no
server."""


@dataclass(frozen=True)
class Promoted:
    """The new timeline and its first position (bytes of WAL); `began` and `done` are monotonic seconds."""

    timeline: int
    switched_at: int
    began: float
    done: float
    fencing: Fencing

    @property
    def seconds(self) -> float:
        """`pg_promote`, until it takes writes."""
        return self.done - self.began


@action(of=lambda old, new: Act(PROMOTE, promotion(old, new)))
def promote(services: Services, old: Postgres, new: Postgres, attested: str) -> Promoted:
    """Run `pg_promote` and wait, right after the last check of the old primary's fence.

    Raises:
        OpsError: the old primary is not fenced, the server is no standby, or the promotion timed out.
    """
    fencing = fencing_of(services, old)
    fencing.require(attested)
    before = ask_member(new)
    if not before.follows or before.paused != "not paused":
        raise OpsError(
            f"{before.address} cannot be promoted: {before.problem or before.paused}; no server was promoted",
            "run it again: it reports the present state",
        )
    failpoint("failover: before pg_promote")
    began = time.monotonic()
    with new.connect() as connection:
        done = execute(connection, "SELECT pg_promote(true, %s)", PROMOTE_SECONDS)[0][0]
    if not done:
        raise OpsError(
            f"{before.address} was not promoted within {PROMOTE_SECONDS} s",
            "check its log, then run it again: it continues, or reports the present primary",
        )
    finished = time.monotonic()
    failpoint("failover: promoted")
    history = history_of(new)
    return Promoted(history.number, history.ancestors[-1][1] if history.ancestors else 0, began, finished, fencing)


def promotion(old: Postgres, new: Postgres) -> str:
    """The target of the act."""
    return f"{address(old)} → {address(new)}"


def history_of(primary: Postgres) -> Timeline:
    """The timeline of a server that takes writes, with its ancestors.

    https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
    """
    with primary.connect() as connection:
        ((number, text),) = execute(connection, _HISTORY)
    return Timeline.read(int(number), str(text or ""))


_HISTORY = """
SELECT ('x' || name)::bit(32)::int, pg_read_file('pg_wal/' || name || '.history', 0, 1000000, true)
FROM left(pg_walfile_name(pg_current_wal_lsn()), 8) AS name
"""


@action(idempotent=True)
def make_slots(primary: Postgres, names: Sequence[str]) -> tuple[str, ...]:
    """Create the missing physical slots, which keep WAL from now on. Returns the created ones."""
    made = []
    with primary.connect() as connection:
        there = {str(row[0]) for row in execute(connection, "SELECT slot_name FROM pg_replication_slots")}
        for name in dict.fromkeys(filter(None, names)):
            if name not in there:
                execute(connection, "SELECT pg_create_physical_replication_slot(%s, true)", name)
                made.append(name)
    return tuple(made)


@action(idempotent=True)
def start_receiver(services: Services, role: str) -> str:
    """Start the WAL receiver. Returns its manager's error, "" without one. It does not wait: the stream is judged
    later."""
    try:
        start_one(services, role)
    except OpsError as error:
        return error.message
    return ""


@action(idempotent=True)
def checkpoint(primary: Postgres) -> float:
    """CHECKPOINT; returns its seconds. After a promotion pg_rewind reads the new timeline from it."""
    started = time.monotonic()
    with primary.connect() as connection:
        execute(connection, "CHECKPOINT")
    return time.monotonic() - started


def streams(primary: Postgres, name: str) -> bool:
    """Whether a server of that application_name streams from it now."""
    with primary.connect() as connection:
        return bool(execute(connection, _STREAMS, name))


_STREAMS = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"


def wait_for_stream(primary: Postgres, name: str, seconds: float) -> bool:
    """Whether a server of that application_name streams from it within `seconds`."""
    return _in_time(lambda: streams(primary, name), f"the stream to {name}", seconds)


def commits_return(primary: Postgres, seconds: float) -> bool:
    """Whether enough synchronous standbys connect within `seconds`, so that commits return."""
    return _in_time(lambda: not synchrony(primary).hangs, "commits that return", seconds)


def _in_time(ready: Callable[[], bool], what: str, seconds: float) -> bool:
    try:
        return until(ready, what=what, seconds=seconds, every_seconds=0.05)
    except Unreachable:
        return False
