"""What a PostgreSQL server is, and what stands in the way of replacing a database on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocks.postgres.server import Postgres, execute, is_pooled
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from tasks.host.disk import is_here

Presence = Literal["up", "down", "absent"]


@dataclass(frozen=True)
class Server:
    """A running server and this login's rights on it."""

    version: int
    text: str
    superuser: bool
    checksums: bool
    fsync: bool
    in_recovery: bool
    roles: tuple[str, ...]
    databases: tuple[str, ...]

    @property
    def major(self) -> int:
        """18 for 18.6."""
        return self.version // 10000

    @property
    def is_bare(self) -> bool:
        """Nobody has a database in it: a new cluster, or one whose only database is gone."""
        return not set(self.databases) - {"postgres"}


@dataclass(frozen=True)
class Obstacle:
    """Something tied to a database that a swap would tear off."""

    what: str
    hint: str


@probe
def read_server(postgres: Postgres) -> Server:
    """Version, rights, roles and databases.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        row = execute(connection, _SERVER)[0]
        version, text, superuser, checksums, fsync, in_recovery, roles, databases = row
        return Server(
            int(version),
            str(text),
            bool(superuser),
            checksums == "on",
            fsync == "on",
            bool(in_recovery),
            tuple(roles),
            tuple(databases),
        )


_SERVER = """
SELECT current_setting('server_version_num'), current_setting('server_version'), rolsuper OR rolbypassrls,
       current_setting('data_checksums'), current_setting('fsync'), pg_is_in_recovery(),
       ARRAY(SELECT rolname::text FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY 1),
       ARRAY(SELECT datname::text FROM pg_database WHERE datname NOT IN ('template0', 'template1') ORDER BY 1)
FROM pg_roles WHERE rolname = current_user
"""


def presence(postgres: Postgres) -> Presence:
    """Whether the server answers, is down, or has lost its data directory.

    Raises:
        OpsError: it answers, and its data is elsewhere than the environment says: nothing there may be made anew.
    """
    data, is_local = Path(postgres.data_directory), is_here(postgres.host)
    is_gone = is_local and _is_gone(data)
    try:
        with postgres.connect() as connection:
            rows = execute(connection, "SELECT setting FROM pg_settings WHERE name = 'data_directory'")
    except OpsError as error:
        if not is_gone and not isinstance(error, Unreachable):
            raise
        return "absent" if is_gone else "down"
    if is_local and rows and Path(str(rows[0][0])).resolve() != data.resolve():
        raise OpsError(
            f"the server's data is in {rows[0][0]}, the environment says {data}",
            "correct [postgres] data_directory and register the blocks again",
        )
    return "absent" if is_gone else "up"  # a server may live on for a minute after its files were removed


def _is_gone(data: Path) -> bool:
    """Only what can be seen to be gone is gone: a directory that this user may not look into is not."""
    try:
        return data.parent.exists() and not (data / "PG_VERSION").exists()
    except PermissionError:
        return False


def program_version(postgres: Postgres, program: str) -> int:
    """The major version of a client program: 18."""
    printed = shell.run([postgres.program(program), "--version"], timeout_seconds=10).stdout
    return (
        int(printed.split()[-1].split(".")[0])
        if printed.split()[-1][0].isdigit()
        else int(printed.split("(PostgreSQL) ")[1].split(".")[0])
    )


def judge_programs(postgres: Postgres, server: Server) -> None:
    """Dump and restore with the server's own major version of the programs.

    Raises:
        OpsError: they are of another one.
    """
    found = program_version(postgres, "pg_dump")
    if found != server.major:
        raise OpsError(
            f"the server is PostgreSQL {server.text}, the programs in {postgres.programs} are {found}",
            f"install PostgreSQL {server.major}'s programs, or correct [postgres] programs",
        )


@probe
def read_database_bytes(postgres: Postgres, database: str) -> int:
    """Size on disk.

    Raises:
        OpsError: there is no such database.
    """
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT pg_database_size(oid) FROM pg_database WHERE datname = %s", database)
    if not rows:
        raise OpsError(f"there is no database {database}", "restore it: full-restore or restore-database")
    return int(rows[0][0])


@dataclass(frozen=True)
class Identity:
    """Which database is behind a name: its OID, 0 where there is none."""

    database: str
    oid: int


@probe
def read_identity(postgres: Postgres, database: str) -> Identity:
    """What a plan pins: another database behind the same name later is refused."""
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT oid FROM pg_database WHERE datname = %s", database)
    return Identity(database, int(rows[0][0]) if rows else 0)


@dataclass(frozen=True)
class Position:
    """Which database is behind a name (OID, 0: none), in which cluster, and how far its WAL is (bytes). `pooled`: a
    connection pooler answers in the server's place."""

    oid: int
    system: str
    timeline: int
    lsn: int
    pooled: bool = False


def read_position(postgres: Postgres, database: str) -> Position:
    """Where a plan begins: what is written behind it is written later. No step, and not retried: a server that is down
    is pinned as that.

    Raises:
        OpsError: the server does not answer or refuses.
    """
    with postgres.connect() as connection:
        oid, system, timeline, lsn = execute(connection, _POSITION, database)[0]
        return Position(int(oid), str(system), int(timeline), int(lsn), is_pooled(connection))


_POSITION = """
SELECT coalesce((SELECT oid::bigint FROM pg_database WHERE datname = %s), 0),
       (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END - '0/0'::pg_lsn
"""


@probe
def has_own_types(postgres: Postgres, database: str) -> bool:
    """Whether a database has types that were made in it (enums, domains, composites, an extension's): their OIDs change
    with a restore, and drivers cache them. A table's row type and arrays do not count."""
    with postgres.connect(database) as connection:
        return bool(execute(connection, _OWN_TYPES)[0][0])


_OWN_TYPES = """
SELECT EXISTS (SELECT FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
               WHERE t.oid >= 16384 AND t.typcategory <> 'A' AND coalesce(c.relkind, 'c') = 'c')
"""


@probe
def find_obstacles(postgres: Postgres, database: str) -> tuple[Obstacle, ...]:
    """Prepared transactions, logical slots and subscriptions that are tied to a database (recovery-rules, swap)."""
    with postgres.connect() as connection:
        prepared = execute(connection, "SELECT gid FROM pg_prepared_xacts WHERE database = %s", database)
        slots = execute(connection, "SELECT slot_name FROM pg_replication_slots WHERE database = %s", database)
        subscriptions = execute(
            connection,
            "SELECT subname FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid WHERE d.datname = %s",
            database,
        )
    return (
        *(Obstacle(f"prepared transaction {row[0]}", "COMMIT PREPARED or ROLLBACK PREPARED it") for row in prepared),
        *(Obstacle(f"logical slot {row[0]}", "stop its consumer and drop the slot, or hand it over") for row in slots),
        *(
            Obstacle(f"subscription {row[0]}", "disable and drop it: it would go on filling the old database")
            for row in subscriptions
        ),
    )
