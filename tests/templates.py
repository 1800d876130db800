"""Data directories that were shut down, of which tests make clusters by copying: one initdb serves a session."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from lab import postgres
from lab.layout import Layout
from lab.nodes import nodes
from lab.processes import Account, run
from lab.state import Passwords, Ports, State
from tests.servers import binaries, taken_ports

_PREFIX = "ops-cluster-"


def new_directory(kind: str, *, on_disk: bool = False) -> Path:
    """A new one, which the servers' user can traverse to: in memory where there is plenty, since a disk takes ten times
    as long for the copies, and what these tests kill are processes. What killed test runs left is removed."""
    memory, disk = Path("/dev/shm"), Path("/var/tmp")
    for left in (*memory.glob(f"{_PREFIX}*"), *disk.glob(f"{_PREFIX}*")):
        if not psutil.pid_exists(int(left.name.removeprefix(_PREFIX).split("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    roomy = not on_disk and memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30
    made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{kind}-", dir=memory if roomy else disk))
    made.chmod(0o755)
    return made


@dataclass(frozen=True)
class Template:
    """A data directory that was shut down, with the application's role and database, and its passwords."""

    base: Path
    data: Path
    passwords: Passwords

    @classmethod
    def made(cls) -> Template:
        """By initdb, with a system identifier of its own."""
        account, programs = Account.of_servers(), binaries()
        base = new_directory("template")
        layout = Layout(base, "template")
        state = State(str(layout.root), Ports.chosen(taken_ports()), Passwords())
        node = dataclasses.replace(nodes(layout, state)[0], configuration=layout.postgres_data / "postgresql.conf")
        account.directory(node.data.parent, 0o755)
        postgres.create_cluster(node, state, programs, account)
        login = {"PGPASSWORD": state.passwords.postgres_admin, "PATH": os.environ["PATH"]}
        control: list[str | Path] = [
            programs.postgres / "pg_ctl",
            "-D",
            node.data,
            "-w",
            "-t",
            "600",
            "-l",
            node.data.parent / "log",
        ]
        options = f"-c port={node.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        run([*control, "-o", options, "start"], cwd=node.data.parent, account=account, environment=login)
        try:
            postgres.create_database(state, node.port)
        finally:
            run([*control, "-m", "fast", "stop"], cwd=node.data.parent, account=account, environment=login)
        return cls(base, node.data, state.passwords)

    def remove(self) -> None:
        """Its files."""
        shutil.rmtree(self.base)
