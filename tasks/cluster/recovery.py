"""The recovery of a private instance: wait for it, read its position, promote it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import psycopg

from blocks.postgres.server import Postgres, execute
from runbook.errors import VerificationFailed
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.cluster.instance import ISOLATED, PrivateInstance, log_of, servers_in
from tasks.cluster.tablespaces import outside_links
from tasks.cluster.target import Stop
from tasks.postgres.server.log_reasons import find_reason
from tasks.wal.format.names import lsn_of

REPLAY_SECONDS = 24 * 3600.0
PROMOTE_SECONDS = 300.0


@dataclass(frozen=True)
class RecoveryProgress:
    """The position of a paused instance. `before` and `after`: the status of the transactions around the target ("":
    not read). `invalid`: the databases that a DROP DATABASE has marked as invalid, by OID: nobody can connect to
    them."""

    replayed: int
    paused: bool
    system: int
    timeline: int
    before: str
    after: str
    isolation: tuple[str, ...]
    invalid: Mapping[int, str] = field(default_factory=dict)


@action
def wait_recovered(instance: PrivateInstance, system: int) -> int:
    """Wait until it has replayed up to its target and is paused there. Returns the LSN.

    Raises:
        VerificationFailed: the recovery ended earlier, or failed.
    """

    def stands() -> int:
        if not servers_in(instance.data):
            reason = find_reason(log_of(instance))
            other = "choose another backup or point in time: show-recovery-options lists them"
            hint = reason.hint.replace("start it", "run this again") if reason else other
            raise VerificationFailed(f"the recovery failed: {last_words(instance)}", hint)
        with instance.postgres.connect(seconds=2) as connection:
            state, lsn = execute(connection, _PAUSED)[0]
        return lsn_of(str(lsn)) if state == "paused" else 0

    until(lambda: servers_in(instance.data) or log_of(instance), what="the start of the copy", seconds=30)
    return until(stands, what="the end of the recovery", seconds=REPLAY_SECONDS, every_seconds=0.1)


_PAUSED = """
SELECT CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() ELSE 'promoted' END,
       coalesce(pg_last_wal_replay_lsn(), '0/0')
"""


def last_words(instance: PrivateInstance) -> str:
    """Why a server ended, from its log."""
    lines = log_of(instance).splitlines()
    fatal = [line for line in lines if re.search(r"(FATAL|PANIC):", line)]
    return re.sub(r"^.*?(FATAL|PANIC): +", "", (fatal or lines[-1:] or ["it has no log"])[-1])[:300]


@probe
def read_standing(instance: PrivateInstance, stop: Stop, full_xid: dict[int, int]) -> RecoveryProgress:
    """Read the paused copy's position, and its status of the transactions on both sides of the target."""
    with instance.postgres.connect() as connection:
        state, lsn = execute(connection, _PAUSED)[0]
        system, timeline = execute(
            connection,
            "SELECT s.system_identifier, c.timeline_id FROM pg_control_system() s, pg_control_checkpoint() c",
        )[0]
        shown: dict[str, str] = dict(
            execute(connection, "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", [*ISOLATED])
        )
        invalid = {int(oid): str(name) for oid, name in execute(connection, _INVALID)}
    before = _status(instance.postgres, full_xid[stop.before.xid]) if stop.before else ""
    after = _status(instance.postgres, full_xid[stop.after.xid]) if stop.after else ""
    wrong = tuple(f"{name} = {shown.get(name)}" for name, value in ISOLATED.items() if shown.get(name) != value)
    wrong += tuple(f"tablespace {oid} in {path}" for oid, path in outside_links(instance.data).items())
    return RecoveryProgress(
        lsn_of(str(lsn)), state == "paused", int(str(system)), int(timeline), before, after, wrong, invalid
    )


# src/include/catalog/pg_database.h: DATCONNLIMIT_INVALID_DB
_INVALID = "SELECT oid::bigint, datname FROM pg_database WHERE datconnlimit = -2 ORDER BY 2"


def _status(postgres: Postgres, xid: int) -> str:
    """`committed`, `aborted`, `in progress`, `not begun`, or `too long ago`."""
    with postgres.connect() as connection:
        try:
            rows = execute(connection, "SELECT pg_xact_status(%s::text::xid8)", str(xid))
        except psycopg.errors.InvalidParameterValue:
            return "not begun"
    return str(rows[0][0] or "too long ago")


@probe
def read_prepared(postgres: Postgres) -> list[str]:
    """The names of the prepared transactions of a promoted server: it shows none while it recovers."""
    with postgres.connect() as connection:
        return [str(gid) for (gid,) in execute(connection, "SELECT gid FROM pg_prepared_xacts ORDER BY 1")]


@action
def promote_instance(instance: PrivateInstance, slots: Mapping[str, bool]) -> int:
    """End its recovery, on a new timeline, whose number is returned. `slots`: physical slots to create first, so that
    the WAL receiver misses nothing.

    It is paused at its target, and resuming ends the recovery; a paused server looks for `pg_promote` only once a
    second. https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-RECOVERY-TARGET-ACTION

    Raises:
        Unreachable: the recovery does not end.
    """
    with instance.postgres.connect() as connection:
        if execute(connection, "SELECT pg_is_in_recovery()")[0][0]:
            execute(connection, "SELECT pg_wal_replay_resume()")
            until(
                lambda: not execute(connection, "SELECT pg_is_in_recovery()")[0][0],
                what="the end of the copy's recovery",
                seconds=PROMOTE_SECONDS,
                every_seconds=0.02,
                hint=f"check {instance.log}; nothing live was touched",
            )
        for slot, now in slots.items():
            execute(connection, "SELECT pg_create_physical_replication_slot(%s, %s)", slot, now)
        execute(connection, "CHECKPOINT")
        return int(execute(connection, "SELECT timeline_id FROM pg_control_checkpoint()")[0][0])
