"""The lab's PostgreSQL: cluster, configuration (manual §1.5), role and database of the application."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from blocks.postgres.restore_command import restore_command
from lab.processes import OsAccount, run, write
from lab.servers.binaries import Binaries
from lab.servers.nodes import Node
from lab.servers.supervision import Program
from lab.state.layout import Layout
from lab.state.state import LabState
from runbook.errors import OpsError

ADMIN, ROLE, DATABASE = "postgres", "grc_user", "grc_db"

# Manual §1.3 and §1.5.
_RECOMMENDED: Mapping[str, str] = {
    "max_connections": "200",
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "maintenance_work_mem": "64MB",
    "checkpoint_completion_target": "0.9",
    "wal_buffers": "16MB",
    "default_statistics_target": "100",
    "random_page_cost": "1.1",
    "effective_io_concurrency": "200",
    "work_mem": "4MB",
    "min_wal_size": "1GB",
    "max_wal_size": "4GB",
    "autovacuum": "on",
    "autovacuum_max_workers": "3",
    "autovacuum_naptime": "1min",
    "autovacuum_vacuum_threshold": "50",
    "autovacuum_analyze_threshold": "50",
    "autovacuum_vacuum_scale_factor": "0.1",
    "autovacuum_analyze_scale_factor": "0.05",
}

# A commit waits until the standby or the receiver has it on disk, so that either may be away. A slot whose reader is
# away for long is given up before WAL fills the disk. Hint bits in WAL: pg_rewind needs them.
_REPLICATION: Mapping[str, str] = {
    "wal_level": "replica",
    "wal_log_hints": "on",
    "synchronous_standby_names": "ANY 1 (standby, receiver)",
    "max_slot_wal_keep_size": "4GB",
    "wal_retrieve_retry_interval": "500ms",
}

# A lab's passwords are long and random, so there is nothing to stretch; every connection would cost 12 ms of processor.
_ITERATIONS = "64"

_HBA = """\
# TYPE  DATABASE     USER  ADDRESS       METHOD
host    all          all   127.0.0.1/32  scram-sha-256
host    replication  all   127.0.0.1/32  scram-sha-256
"""


def dsn(state: LabState, port: int) -> str:
    """The application's database as the application's role, on one of the nodes."""
    return f"postgresql://{ROLE}:{quote(state.passwords.postgres)}@127.0.0.1:{port}/{DATABASE}"


def admin_dsn(state: LabState, port: int, database: str = "postgres") -> str:
    """The superuser, on one of the nodes."""
    return f"postgresql://{ADMIN}:{quote(state.passwords.postgres_admin)}@127.0.0.1:{port}/{database}"


def program(node: Node, binaries: Binaries, account: OsAccount) -> Program:
    """PostgreSQL under the supervisor: SIGINT is its fast shutdown.

    https://www.postgresql.org/docs/current/server-shutdown.html
    """
    argv = (binaries.postgres / "postgres", "-D", node.data, "-c", f"config_file={node.configuration}")
    user = account.name if account.is_other else ""
    return Program(node.program, argv, node.data.parent, user=user, stop_signal="INT")


def configuration(node: Node, layout: Layout, binaries: Binaries) -> str:
    """The text of a node's postgresql.conf: the same for both, but for the port.

    A standby's last resort is the segment that the receiver has not finished: where the primary is dead, it may hold
    what was acknowledged last.
    """
    settings = {
        **_RECOMMENDED,
        **_REPLICATION,
        **({"summarize_wal": "on"} if binaries.postgres_major >= 17 else {}),
        **({"scram_iterations": _ITERATIONS} if binaries.postgres_major >= 16 else {}),
        "restore_command": restore_command(str(layout.wal)),
        "listen_addresses": "127.0.0.1",
        "port": str(node.port),
        "unix_socket_directories": "",
        "hba_file": str(layout.pg_hba_conf),
        "password_encryption": "scram-sha-256",
        "track_io_timing": "on",
        "log_destination": "stderr",
        "logging_collector": "off",
        "log_line_prefix": "%m [%p] %q%u@%d ",
        "log_timezone": "Asia/Tokyo",
        "timezone": "Asia/Tokyo",
        "shared_preload_libraries": "pg_stat_statements" if binaries.has_statements else "",
    }
    lines = (f"{name} = '{_escaped(value)}'\n" for name, value in settings.items())
    return "# Written by `python -m lab up`; kept as you edit it until the lab's ports change.\n" + "".join(lines)


def hba() -> str:
    """The text of pg_hba.conf."""
    return _HBA


def create_cluster(node: Node, state: LabState, binaries: Binaries, account: OsAccount) -> bool:
    """initdb with data checksums, UTF-8 and the C.UTF-8 locale; False when the cluster is there.

    Raises:
        OpsError: the data directory is of another major version.
    """
    version = node.data / "PG_VERSION"
    if version.exists():
        if (major := version.read_text().strip()) != str(binaries.postgres_major):
            raise OpsError(
                f"the lab's data is PostgreSQL {major}'s, and {binaries.postgres} is version {binaries.postgres_major}",
                f"bring it up with version {major}, or remove {node.data.parents[1]} to start anew",
            )
        return False
    # The builtin provider needs no operating system locale, and sorts the same everywhere (PostgreSQL 17 and later).
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if binaries.postgres_major >= 17 else []
    iterations = [f"--set=scram_iterations={_ITERATIONS}"] if binaries.postgres_major >= 16 else []
    partial = node.data.with_name("data.new")  # a killed initdb leaves nothing that looks like a cluster
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=node.data.parent) as directory:
        account.own(Path(directory))
        password = Path(directory) / "password"
        write(password, state.passwords.postgres_admin + "\n", 0o400, account)
        run(
            [
                binaries.postgres / "initdb",
                "-D",
                partial,
                "-U",
                ADMIN,
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                *locale,
                *iterations,
                "--data-checksums",
                "--no-sync",
            ],
            cwd=Path(directory),
            account=account,
        )
    partial.rename(node.data)
    return True


def create_database(state: LabState, port: int) -> None:
    """The application's role and database, idempotent: an ACL and a database setting that a recovery must preserve."""
    role, database = sql.Identifier(ROLE), sql.Identifier(DATABASE)
    with psycopg.connect(admin_dsn(state, port), autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [ROLE]).fetchone():
            # The verifier, not the password: statements end up in pg_stat_statements.
            verifier = connection.pgconn.encrypt_password(
                state.passwords.postgres.encode(), ROLE.encode(), b"scram-sha-256"
            ).decode()
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(verifier)))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0").format(database, role))
            connection.execute(sql.SQL("REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC").format(database))
            connection.execute(sql.SQL("GRANT CONNECT, TEMPORARY ON DATABASE {} TO {}").format(database, role))
            connection.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Tokyo'").format(database))
            connection.execute(
                sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal("AI interview system"))
            )
        available = "SELECT 1 FROM pg_available_extensions WHERE name = 'pg_stat_statements'"
        if connection.execute(available).fetchone():
            connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")


def _escaped(value: str) -> str:
    return value.replace("'", "''")
