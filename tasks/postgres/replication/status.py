"""Replication status: the slots, standbys and archiver of a server.

Only reads. https://www.postgresql.org/docs/current/monitoring-stats.html
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe


@dataclass(frozen=True)
class ReplicationSettings:
    """The server's settings for replication. `sees_all`: this login can read other sessions' statistics."""

    in_recovery: bool
    sees_all: bool
    archive_mode: str
    archives_by: str
    sync_names: str
    sync_commit: str
    max_slot_wal: str
    sync_commit_elsewhere: tuple[str, ...]

    @property
    def archives(self) -> bool:
        """Whether it archives WAL."""
        return self.archive_mode == "always" or (self.archive_mode == "on" and not self.in_recovery)


@dataclass(frozen=True)
class Slot:
    """A replication slot. `held_bytes`: WAL retained for it; `safe_bytes`: WAL until it can be lost (None: no limit is
    set, or it is already lost)."""

    name: str
    kind: str
    database: str
    active: bool
    wal_status: str
    held_bytes: int
    safe_bytes: int | None
    inactive_since: str
    synced: bool


@dataclass(frozen=True)
class Standby:
    """A receiver of WAL. Bytes behind this server's end of WAL; `lag_seconds`: NaN if not measured."""

    name: str
    address: str
    state: str
    sync_state: str
    slot: str
    is_logical: bool
    flush_bytes: int
    replay_bytes: int | None
    lag_seconds: float
    silent_seconds: float


@dataclass(frozen=True)
class ArchiverStatus:
    """The archiver. `waiting` files are not archived yet, the oldest for `waiting_seconds`."""

    archived: int
    failed: int
    last_archived: str
    last_failed: str
    is_failing: bool
    waiting: int
    waiting_seconds: float


@dataclass(frozen=True)
class SyncNames:
    """`synchronous_standby_names`, parsed: `needed` of `names` must confirm a commit."""

    needed: int
    names: tuple[str, ...]

    def unmatched(self, standbys: tuple[Standby, ...]) -> list[str]:
        """Names that no connected standby has (`*` is any)."""
        known = {standby.name.lower() for standby in standbys}
        return [name for name in self.names if name != "*" and name.lower() not in known]


@dataclass(frozen=True)
class Replication:
    """The status at one moment. `replay_age_seconds`: time since the last replayed commit on a standby, None if there
    is none."""

    settings: ReplicationSettings
    slots: tuple[Slot, ...]
    standbys: tuple[Standby, ...]
    archiver: ArchiverStatus
    waiting_commits: int
    waited_seconds: float
    receiver: str
    replay_age_seconds: float | None

    @property
    def physical(self) -> tuple[Standby, ...]:
        """Receivers of the whole WAL; a logical subscriber has only some tables' rows and cannot replace the server."""
        return tuple(standby for standby in self.standbys if not standby.is_logical)


DOES_NOT_WAIT = ("off", "local")
"""Values of synchronous_commit with which a commit waits for no standby."""
_LIST = re.compile(r"^(?:(?:FIRST|ANY)\s+)?(\d+)\s*\((.*)\)$", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r'"((?:[^"]|"")+)"|([^\s,"]+)')


def parse_sync_names(text: str) -> SyncNames:
    """Parse `FIRST 2 (a, b)`, `ANY 1 (a, "b c")`, `2 (a, b)` or `a, b`; empty text needs no standby."""
    found = _LIST.match(text.strip())
    inner = found.group(2) if found else text
    names = tuple(quoted.replace('""', '"') or plain for quoted, plain in _NAME.findall(inner))
    return SyncNames((int(found.group(1)) if found else 1) if names else 0, names)


@probe
def read_replication(postgres: Postgres) -> Replication:
    """Settings, slots, standbys, archiver, waiting commits, and on a standby its WAL receiver.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        settings = _settings(connection)
        commits = execute(connection, _WAITING)[0]
        receiver, replay_age = execute(connection, _RECEIVER)[0]
        return Replication(
            settings,
            tuple(_slot(row) for row in execute(connection, _SLOTS)),
            tuple(_standby(row) for row in execute(connection, _STANDBYS)),
            _archiver(connection),
            int(commits[0]),
            float(commits[1]),
            str(receiver or ""),
            None if replay_age is None else float(replay_age),
        )


def _settings(connection: Connection) -> ReplicationSettings:
    in_recovery, sees_all, mode, by, names, commit, max_slot_wal = execute(connection, _SETTINGS)[0]
    elsewhere = tuple(str(row[0]) for row in execute(connection, _SYNC_COMMIT_ELSEWHERE))
    return ReplicationSettings(
        bool(in_recovery), bool(sees_all), str(mode), str(by), str(names), str(commit), str(max_slot_wal), elsewhere
    )


# Without an archive_command the server shows “(disabled)” if archive_mode is off, and nothing if it is on.
_SETTINGS = """
SELECT pg_is_in_recovery(), pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
       current_setting('archive_mode'),
       coalesce(nullif(current_setting('archive_library', true), ''), current_setting('archive_command')),
       current_setting('synchronous_standby_names'),
       (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'),
       current_setting('max_slot_wal_keep_size')
"""
_SYNC_COMMIT_ELSEWHERE = """
SELECT concat_ws(' ', entry, 'for role ' || r.rolname, 'in database ' || d.datname)
FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase,
     unnest(s.setconfig) AS entry
WHERE entry LIKE 'synchronous_commit=%' ORDER BY 1
"""
# Never cancel these: a cancelled wait is reported as committed.
_WAITING = """
SELECT count(*), coalesce(max(extract(epoch FROM clock_timestamp() - state_change)), 0)
FROM pg_stat_activity WHERE wait_event = 'SyncRep'
"""
_RECEIVER = """
SELECT (SELECT concat_ws(' ', status, 'from', sender_host) FROM pg_stat_wal_receiver),
       extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())
"""


def _slot(row: tuple[object, ...]) -> Slot:
    name, kind, database, active, status, held, safe, since, synced = row
    return Slot(
        str(name),
        str(kind),
        str(database or ""),
        bool(active),
        str(status or "reserves nothing"),
        int(str(held)),
        None if safe is None else int(str(safe)),
        str(since or "")[:19],
        bool(synced),
    )


# to_jsonb: `inactive_since` and `synced` are new in 17.
_SLOTS = """
WITH here AS (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn)
SELECT slot_name, slot_type, database, active, wal_status,
       coalesce(pg_wal_lsn_diff(here.lsn, restart_lsn), 0)::bigint, safe_wal_size,
       to_jsonb(s)->>'inactive_since', coalesce((to_jsonb(s)->>'synced')::boolean, false)
FROM here, pg_replication_slots s ORDER BY active, slot_name
"""


def _standby(row: tuple[object, ...]) -> Standby:
    name, address, state, sync, slot, logical, flush, replay, lag, silent = row
    return Standby(
        str(name),
        str(address),
        str(state),
        str(sync),
        str(slot or ""),
        bool(logical),
        int(str(flush)),
        None if replay is None else int(str(replay)),
        float(str(lag)) if lag is not None else math.nan,
        float(str(silent)) if silent is not None else math.nan,
    )


# The last replayed LSN of a silent standby is old: hence the time since its last reply. A subscriber that copies its
# first rows has no active slot, but it is connected to a database, which a standby never is.
_STANDBYS = """
WITH here AS (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn)
SELECT coalesce(r.application_name, ''), coalesce(host(r.client_addr), 'this host'), coalesce(r.state, ''),
       coalesce(r.sync_state, ''), s.slot_name, coalesce(s.slot_type = 'logical', a.datid IS NOT NULL),
       coalesce(pg_wal_lsn_diff(here.lsn, coalesce(r.flush_lsn, r.sent_lsn)), 0)::bigint,
       pg_wal_lsn_diff(here.lsn, r.replay_lsn)::bigint,
       extract(epoch FROM CASE WHEN r.replay_lsn IS NULL THEN r.flush_lag ELSE r.replay_lag END),
       extract(epoch FROM clock_timestamp() - r.reply_time)
FROM here, pg_stat_replication r LEFT JOIN pg_replication_slots s ON s.active_pid = r.pid
     LEFT JOIN pg_stat_activity a ON a.pid = r.pid
WHERE r.state IS DISTINCT FROM 'backup' ORDER BY 1, r.pid
"""


def _archiver(connection: Connection) -> ArchiverStatus:
    archived, failed, archived_wal, archived_at, failed_wal, failed_at = execute(connection, _ARCHIVER)[0]
    waiting, oldest = execute(connection, _READY)[0]
    return ArchiverStatus(
        int(archived),
        int(failed),
        _at(archived_wal, archived_at),
        _at(failed_wal, failed_at),
        bool(failed_at and (archived_at is None or failed_at > archived_at)),
        int(waiting),
        float(oldest),
    )


def _at(name: object, moment: datetime | None) -> str:
    return f"{name} at {moment:%Y-%m-%d %H:%M:%S %Z}" if moment else "never"


_ARCHIVER = """
SELECT archived_count, failed_count, last_archived_wal, last_archived_time, last_failed_wal, last_failed_time
FROM pg_stat_archiver
"""
_READY = """
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(modification)), 0)
FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'
"""
