"""A PostgreSQL server: its version, its databases, and the obstacles to replacing a database."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from psycopg import sql

from blocks.postgres.server import Postgres, execute, is_pooled
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.files import inside
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
        """Whether it has no database of a user: a new cluster, or one that lost its only database."""
        return not set(self.databases) - {"postgres"}


@dataclass(frozen=True)
class Obstacle:
    """An object that belongs to a database and would not follow a swap."""

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


@probe
def has_tables(postgres: Postgres, database: str) -> bool:
    """Whether a database has a user's tables, or rows in an extension's tables for data of users (pg_cron's jobs).

    https://www.postgresql.org/docs/current/extend-extensions.html#EXTEND-EXTENSIONS-CONFIG-TABLES

    Raises:
        LoginRefused, Unreachable: the server does not answer, or refuses the log-in.
    """
    with postgres.connect(database) as connection:
        for schema, name, of_extension in execute(connection, _TABLES):
            rows = sql.SQL("SELECT 1 FROM {} LIMIT 1").format(sql.Identifier(schema, name))
            if not of_extension or execute(connection, rows):
                return True
    return False


_TABLES = """
SELECT n.nspname, c.relname, e.oid IS NOT NULL
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
LEFT JOIN pg_extension e ON e.oid = d.refobjid
WHERE c.relkind IN ('r', 'p', 'm') AND c.relpersistence <> 't' AND n.nspname !~ '^pg_'
  AND n.nspname <> 'information_schema' AND (e.oid IS NULL OR c.oid = ANY (e.extconfig))
"""


def presence(postgres: Postgres) -> Presence:
    """Whether the server answers, is down, or has lost its data directory.

    Raises:
        OpsError: its data directory or its port differs from the environment's: another server would be judged, or a
            running one taken for a dead one.
    """
    data, is_local = Path(postgres.data_directory), is_here(postgres.host)
    is_lost = is_local and _is_lost(data)
    try:
        with postgres.connect() as connection:
            rows = execute(connection, "SELECT setting FROM pg_settings WHERE name = 'data_directory'")
    except OpsError as error:
        if not is_lost and not isinstance(error, Unreachable):
            raise
        if is_local and (port := _port_of(data)) not in (0, postgres.port):
            raise OpsError(
                f"the server of {data} runs: it listens on port {port}, not on {postgres.port}",
                "correct [postgres] port and register the blocks again",
            ) from None
        return "absent" if is_lost else "down"
    if is_local and rows and Path(str(rows[0][0])).resolve() != data.resolve():
        raise OpsError(
            f"the server's data is in {rows[0][0]}, the environment says {data}",
            "correct [postgres] data_directory and register the blocks again",
        )
    return "absent" if is_lost else "up"  # a server can run for a minute after its files were deleted


def _port_of(data: Path) -> int:
    """The port of the running server of a data directory; 0 where none runs there.

    https://www.postgresql.org/docs/current/storage-file-layout.html (postmaster.pid)
    """
    with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
        lines = inside.read_text(data / "postmaster.pid").splitlines()
        if Path(psutil.Process(int(lines[0])).cwd()) == data.resolve():
            return int(lines[3])
    return 0


def _is_lost(data: Path) -> bool:
    """Whether the data is certainly missing; a directory that this user cannot read is not."""
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
    """Require client programs of the server's major version, for dump and restore.

    Raises:
        OpsError: they have another major version.
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
    """The database behind a name: its OID, 0 if there is none."""

    database: str
    oid: int


@probe
def read_identity(postgres: Postgres, database: str) -> Identity:
    """The identity that a plan pins: a confirmed run refuses another database behind the name."""
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT oid FROM pg_database WHERE datname = %s", database)
    return Identity(database, int(rows[0][0]) if rows else 0)


@dataclass(frozen=True)
class Position:
    """The database behind a name (OID, 0: none), its cluster and its WAL position (bytes). `pooled`: a connection
    pooler answers instead of the server."""

    oid: int
    system: str
    timeline: int
    lsn: int
    pooled: bool = False


def read_position(postgres: Postgres, database: str) -> Position:
    """The position at the time of a plan. Not a step, and not retried: a plan pins that a server is down.

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
    """Whether a database has its own types (enums, domains, composites, an extension's), without row types and arrays.

    A restore changes their OIDs, which drivers cache.
    """
    with postgres.connect(database) as connection:
        return bool(execute(connection, _OWN_TYPES)[0][0])


_OWN_TYPES = """
SELECT EXISTS (SELECT FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
               WHERE t.oid >= 16384 AND t.typcategory <> 'A' AND coalesce(c.relkind, 'c') = 'c')
"""


@probe
def find_obstacles(postgres: Postgres, database: str) -> tuple[Obstacle, ...]:
    """Prepared transactions, logical slots and subscriptions of a database, which would not follow a swap."""
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
            Obstacle(f"subscription {row[0]}", "disable and drop it: it would continue to fill the old database")
            for row in subscriptions
        ),
    )
