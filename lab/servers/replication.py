"""The lab's standby, and the receiver of its WAL: a commit returns when one of them has it on disk.

What follows knows its primary by itself: the standby by its `primary_conninfo`, the receiver because libpq asks both
nodes which one is the primary. So a failover changes no configuration file, and either node may be the primary.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from lab.processes import OsAccount, run, write
from lab.servers import postgres
from lab.servers.binaries import Binaries
from lab.servers.nodes import Node, nodes
from lab.servers.supervision import Program
from lab.state.layout import Layout
from lab.state.state import LabState
from runbook.errors import OpsError

STANDBY, STANDBY_SLOT = "standby", "standby"
RECEIVER, RECEIVER_SLOT, RECEIVER_PROGRAM = "receiver", "wal_archive", "wal-receiver"
_OF_A_ROLE = ("synchronous_standby_names", "primary_conninfo", "primary_slot_name")


def programs(layout: Layout, state: LabState, binaries: Binaries, account: OsAccount) -> list[Program]:
    """Both nodes, and pg_receivewal, which tries again every 5 s where no primary answers.

    It reports what it has written at once, but the end of a segment only with its next status: every second, not 10.
    https://www.postgresql.org/docs/current/app-pgreceivewal.html
    """
    both = nodes(layout, state)
    hosts, ports = ",".join("127.0.0.1" for _ in both), ",".join(str(node.port) for node in both)
    address = f"host={hosts} port={ports} target_session_attrs=primary {_login(layout, RECEIVER)}"
    argv = (
        binaries.postgres / "pg_receivewal",
        "-D",
        layout.wal,
        f"--slot={RECEIVER_SLOT}",
        "--synchronous",
        "--status-interval=1",
        "--no-password",
        f"--dbname={address}",
    )
    user = account.name if account.is_other else ""
    receiver = Program(RECEIVER_PROGRAM, argv, layout.wal, user=user, stop_signal="INT")  # all that it has is on disk
    return [*(postgres.program(node, binaries, account) for node in both), receiver]


def configurations(layout: Layout, state: LabState, binaries: Binaries) -> dict[Path, str]:
    """The text of every configuration file of nodes and receiver."""
    return {
        **{node.configuration: postgres.configuration(node, layout, binaries) for node in nodes(layout, state)},
        layout.pg_hba_conf: postgres.hba(),
        layout.pgpass: f"127.0.0.1:*:*:{postgres.ADMIN}:{state.passwords.postgres_admin}\n",
    }


def accept(primary: Node, state: LabState, *slots: str) -> None:
    """Slots on the primary, where they are not there, which keep WAL from this moment on."""
    with psycopg.connect(postgres.admin_dsn(state, primary.port), autocommit=True) as connection:
        for slot in slots:
            if not connection.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone():
                connection.execute("SELECT pg_create_physical_replication_slot(%s, true)", [slot])


def create_standby(standby: Node, primary: Node, layout: Layout, binaries: Binaries, account: OsAccount) -> None:
    """A copy of the running primary in the place of a standby that is not there.

    The copying has a name of its own: under the standby's, commits would wait for it, and it is on no disk yet.
    """
    if standby.data.exists() and any(standby.data.iterdir()):
        raise OpsError(f"{standby.data} is there and holds no cluster", "look at what is in it, and move it away")
    partial = standby.data.with_name("data.new")  # a killed pg_basebackup leaves nothing that looks like a cluster
    shutil.rmtree(partial, ignore_errors=True)
    address = f"host=127.0.0.1 port={primary.port} {_login(layout, 'base-backup')}"
    run(
        [
            binaries.postgres / "pg_basebackup",
            "-D",
            partial,
            f"--slot={STANDBY_SLOT}",
            "-X",
            "stream",
            "-c",
            "fast",
            "--no-sync",
            "--no-password",
            "-d",
            address,
        ],
        cwd=standby.data.parent,
        account=account,
        seconds=900,
    )
    follow_from_start(partial, primary, layout, account)
    partial.rename(standby.data)


def follow_from_start(data: Path, primary: Node, layout: Layout, account: OsAccount) -> None:
    """Have the cluster in a directory start as a standby of `primary`. A primary that went on alone overrode for whom
    commits wait: its copy must not do so too when it is promoted."""
    path = data / "postgresql.auto.conf"
    kept = [line for line in path.read_text().splitlines() if line.split("=")[0].strip() not in _OF_A_ROLE]
    told = (f"primary_conninfo = '{conninfo(primary, layout)}'", f"primary_slot_name = '{STANDBY_SLOT}'")
    write(path, "\n".join((*kept, *told, "")), 0o600, account)
    write(data / "standby.signal", "", 0o600, account)


def follow(standby: Node, primary: Node, layout: Layout, state: LabState) -> None:
    """Have the running standby stream from where the primary is now: the lab's ports may have changed."""
    with psycopg.connect(postgres.admin_dsn(state, standby.port), autocommit=True) as connection:
        (told,) = connection.execute("SHOW primary_conninfo").fetchone() or ("",)
        if conninfo_to_dict(told).get("port") != str(primary.port):
            wanted = sql.Literal(conninfo(primary, layout))
            connection.execute(sql.SQL("ALTER SYSTEM SET primary_conninfo = {}").format(wanted))
            connection.execute("SELECT pg_reload_conf()")


def conninfo(primary: Node, layout: Layout) -> str:
    """How a standby reaches its primary."""
    return f"host=127.0.0.1 port={primary.port} {_login(layout, STANDBY)}"


def streaming(primary: Node, state: LabState) -> set[str]:
    """The names of those that stream from the primary now."""
    with psycopg.connect(postgres.admin_dsn(state, primary.port), autocommit=True) as connection:
        rows = connection.execute("SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'")
        return {str(name) for (name,) in rows}


def _login(layout: Layout, name: str) -> str:
    return f"user={postgres.ADMIN} passfile={layout.pgpass} application_name={name}"
