"""The state of the servers of a failover: by their answers, or by the files of one that is down.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-RECOVERY-CONTROL
https://www.postgresql.org/docs/current/app-pgcontroldata.html
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from blocks.postgres import nodes
from blocks.postgres.server import Connection, Postgres, execute, first_line
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.files import inside
from runbook.kinds import probe
from runbook.wait import until
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address
from tasks.wal.format.names import lsn_of

MOST_SILENT_SECONDS = 120.0
RECOVERING = ("in archive recovery", "shut down in recovery")
"""The states of a standby in its control file."""


@dataclass(frozen=True)
class ClusterMember:
    """One server now. Positions in WAL are bytes.

    `written`: the end of WAL on a primary, the replay position on a standby; `received`: the end of a standby's stream.
    `problem`: why it does not answer (the rest is empty then); `dead`: there was no answer at all. `receiver`: the
    status of its WAL receiver, `silent` if it heard nothing for longer than a running primary allows; `heard`: the time
    of the last message."""

    address: str
    problem: str = ""
    dead: bool = False
    in_recovery: bool = False
    system: int = 0
    timeline: int = 0
    received: int = 0
    written: int = 0
    paused: str = ""
    receiver: str = ""
    heard: str = ""
    version: int = 0
    sync_names: str = ""
    sync_commit: str = ""

    @property
    def is_primary(self) -> bool:
        """Whether it answers, and takes writes."""
        return not self.problem and not self.in_recovery

    @property
    def follows(self) -> bool:
        """Whether it answers, and is in recovery."""
        return not self.problem and self.in_recovery


@probe
def read_member(postgres: Postgres) -> ClusterMember:
    """See `ask_member`."""
    return ask_member(postgres)


@probe
def read_silent(postgres: Postgres, seconds: float) -> ClusterMember:
    """A standby after it is known whether its primary still sends. If the primary's host or network fails, the session
    stays open for `wal_receiver_timeout`: after `seconds`, in which data in transit arrives, only a new message shows
    that the primary runs. If this user cannot see the messages, the reported status counts."""

    def silent() -> ClusterMember | None:
        found = ask_member(postgres)
        return found if found.receiver != "streaming" else None

    def decided() -> ClusterMember | None:
        found = ask_member(postgres)
        return found if found.receiver != "streaming" or found.heard != first.heard or not found.heard else None

    with contextlib.suppress(Unreachable):
        return until(silent, what="the stream's end", seconds=seconds) or ask_member(postgres)
    first = ask_member(postgres)
    with contextlib.suppress(Unreachable):
        return until(decided, what="a message from the primary", seconds=MOST_SILENT_SECONDS) or first
    return ask_member(postgres)


def ask_member(postgres: Postgres) -> ClusterMember:
    """Query a server. That it does not answer, or refuses, is part of the result."""
    where = address(postgres)
    try:
        with postgres.connect(seconds=nodes.ASK_SECONDS) as connection:
            execute(connection, "SET statement_timeout = '10s'")
            row = execute(connection, _MEMBER)[0]
    except OpsError as error:
        return ClusterMember(where, error.message, isinstance(error, Unreachable))
    except psycopg.Error as error:
        return ClusterMember(where, first_line(error))
    recovery, system, timeline, received, written, paused, receiver, heard, version, names, commit = row
    return ClusterMember(
        where,
        "",
        False,
        bool(recovery),
        int(system),
        int(timeline),
        int(received),
        int(written),
        str(paused),
        str(receiver),
        str(heard),
        int(version),
        str(names),
        str(commit),
    )


# A receiver without messages requests one at half of its timeout, and a running primary sends it.
# https://www.postgresql.org/docs/current/protocol-replication.html
_MEMBER = """
WITH ask AS (SELECT coalesce(nullif(setting::int, 0), 60000) * interval '0.5 ms' + interval '5 s' AS patience
             FROM pg_settings WHERE name = 'wal_receiver_timeout')
SELECT r, (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN r THEN greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                                 (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                                 (SELECT received_tli FROM pg_stat_wal_receiver))
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END,
       CASE WHEN r THEN coalesce(pg_last_wal_receive_lsn() - '0/0'::pg_lsn, 0) ELSE 0 END,
       CASE WHEN r THEN coalesce(pg_last_wal_replay_lsn() - '0/0'::pg_lsn, 0) ELSE pg_current_wal_lsn() - '0/0' END,
       CASE WHEN r THEN pg_get_wal_replay_pause_state() ELSE 'not paused' END,
       coalesce((SELECT CASE WHEN status = 'streaming' AND clock_timestamp() - last_msg_receipt_time > patience
                             THEN 'silent' ELSE status END FROM pg_stat_wal_receiver, ask), ''),
       coalesce((SELECT last_msg_receipt_time::text FROM pg_stat_wal_receiver), ''),
       current_setting('server_version_num'),
       current_setting('synchronous_standby_names'),
       (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit')
FROM (SELECT pg_is_in_recovery() AS r) AS here
"""


@dataclass(frozen=True)
class Lag:
    """A standby as its primary sees it: the bytes not yet on its disk, and those not yet replayed."""

    state: str
    sync_state: str
    flush_bytes: int
    replay_bytes: int


@probe
def read_lag(primary: Postgres, name: str) -> Lag | None:
    """How far the standby of that application_name is behind; None where the primary sends it nothing.

    Raises:
        Unreachable: the primary is down.
    """
    with primary.connect() as connection:
        rows = execute(connection, _LAG, name)
    return Lag(str(rows[0][0]), str(rows[0][1]), int(rows[0][2]), int(rows[0][3])) if rows else None


_LAG = """
SELECT state, sync_state, (pg_current_wal_lsn() - coalesce(flush_lsn, '0/0'))::bigint,
       (pg_current_wal_lsn() - coalesce(replay_lsn, '0/0'))::bigint
FROM pg_stat_replication WHERE application_name = %s ORDER BY replay_lsn DESC NULLS LAST
"""


@dataclass(frozen=True)
class MemberControl:
    """The control file of a data directory. `state`: PostgreSQL's text; `checkpoint`: the place of the last one;
    `reached`: what a standby must replay to be consistent (0 for a primary)."""

    system: int
    state: str
    checkpoint: int
    timeline: int
    reached: int = 0

    @property
    def shut_down(self) -> bool:
        """Whether the server shut down cleanly."""
        return self.state.startswith("shut down")

    @property
    def was_standby(self) -> bool:
        """Whether the server was a standby when it ran last."""
        return self.state in RECOVERING


@probe
def read_control(postgres: Postgres) -> MemberControl | None:
    """See `control_of`."""
    return control_of(postgres)


def control_of(postgres: Postgres) -> MemberControl | None:
    """The control file of a server whose data is on this host and can be read; None otherwise.

    A primary's timeline is the newest that the data directory knows: a promotion writes its history before anything
    else. A standby's is the one that it has replayed.
    """
    data = Path(postgres.data_directory)
    if not is_here(postgres.host):
        return None
    try:
        if not (data / "global" / "pg_control").exists():
            return None
        printed = shell.run(
            [postgres.program("pg_controldata"), "-D", data], environment={"LC_ALL": "C"}, timeout_seconds=30
        ).stdout
        histories = [int(path.stem, 16) for path in (data / "pg_wal").glob("*.history")]
    except (OSError, OpsError):
        return None
    found = dict(re.findall(r"^([^:\n]+):[ \t]+(.+)$", printed, re.MULTILINE))
    # A standby also fetches histories that it cannot follow.
    followed = int(found["Min recovery ending loc's timeline"])
    newer = [followed] if found["Database cluster state"] in RECOVERING else [followed, *histories]
    return MemberControl(
        int(found["Database system identifier"]),
        found["Database cluster state"],
        lsn_of(found["Latest checkpoint location"]),
        max(int(found["Latest checkpoint's TimeLineID"]), *newer),
        lsn_of(found["Minimum recovery ending location"]),
    )


@probe
def read_configured(postgres: Postgres, name: str) -> str:
    """A setting in the configuration files of a stopped server; "" where they cannot be read.

    https://www.postgresql.org/docs/current/app-postgres.html: `postgres -C`
    """
    if not is_here(postgres.host):
        return ""
    file = ["-c", f"config_file={postgres.config_file}"] if postgres.config_file else []
    data = Path(postgres.data_directory)
    if not data.exists() and postgres.config_file:  # of a missing one only the configuration is left
        data = Path(postgres.config_file).parent
    program = str(Path(postgres.programs, "postgres"))
    try:
        return shell.run(
            [program, "-C", name, "-D", str(data), *file],
            user=postgres.os_user,
            directory=Path("/"),
            timeout_seconds=30,
        ).stdout.strip()
    except OpsError:
        return ""


_ALTERED = re.compile(r"^(\w+) = ", re.MULTILINE)
_OWN = re.compile(
    r"primary_\w+|restore_command|recovery_\w+|synchronous_standby_names|cluster_name|port|listen_addresses|"
    r"archive_(command|cleanup_command|library)|hot_standby\w*|data_directory|\w+_file|unix_socket_directories"
)
"""Settings that differ between the servers of a cluster."""


@probe
def find_lost_overrides(old: Postgres, new: Postgres) -> dict[str, tuple[str, str]]:
    """Find the settings of ALTER SYSTEM that `old` has and `new` has otherwise, in their base units: a standby does not
    receive them. A server that does not answer is read from its files.

    https://www.postgresql.org/docs/current/sql-altersystem.html

    Raises:
        OpsError: those of `old` cannot be read.
        Unreachable: `new` does not answer.
    """
    try:
        with old.connect() as connection:
            before = _settings_of(connection, [str(name) for (name,) in execute(connection, _ALTERED_BY_SQL)])
    except (OpsError, psycopg.Error):
        before = {name: read_configured.work(old, name) for name in _altered_in(old)}
    with new.connect() as connection:
        after = _settings_of(connection, [name for name in before if not _OWN.fullmatch(name)])
    known = {name.lower(): value for name, value in before.items()}
    return {name: (known[name.lower()], value) for name, value in after.items() if known[name.lower()] != value}


_ALTERED_BY_SQL = "SELECT DISTINCT name FROM pg_file_settings WHERE sourcefile LIKE '%/postgresql.auto.conf'"


def _settings_of(connection: Connection, names: Sequence[str]) -> dict[str, str]:
    """By PostgreSQL's own spelling (TimeZone); ALTER SYSTEM writes any."""
    names = [name.lower() for name in names]
    rows = execute(connection, "SELECT name, setting FROM pg_settings WHERE lower(name) = ANY(%s)", names)
    return {str(name): str(setting) for name, setting in rows}


def _altered_in(old: Postgres) -> list[str]:
    """The settings in the file of ALTER SYSTEM."""
    hint = "compare with your records: a setting that ALTER SYSTEM changed there is not set on the new primary"
    if not is_here(old.host):
        raise OpsError(f"the server on {old.host} does not show them, and its files are there", hint)
    file = Path(old.data_directory, "postgresql.auto.conf")
    try:
        return _ALTERED.findall(inside.read_text(file, "replace"))
    except OSError as error:
        raise OpsError(f"{file}: {error.strerror}", hint) from None
