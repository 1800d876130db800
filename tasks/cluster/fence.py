"""The fence of a database server whose data directory is replaced: it is stopped, and how far it got is known."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres
from blocks.services.service import Services
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.cluster.instance import servers_in
from tasks.cluster.stopped import read_control
from tasks.wal.format.names import lsn_of


@dataclass(frozen=True)
class FencedServer:
    """A stopped server. `data`: its data directory, or where a killed run had renamed it to; None: there is none.
    `checkpoint`: the LSN of its last checkpoint, at least up to which it wrote; `timeline`: of that; `control`: what
    its control file says, which changes when it runs again. `problem`: why the control file cannot be read."""

    data: Path | None
    timeline: int = 0
    checkpoint: int = 0
    system: int = 0
    control: str = ""
    problem: str = ""


@probe
def read_fence(postgres: Postgres, services: Services) -> FencedServer:
    """Prove that the server is stopped, by its service and by its processes, and read how far it got.

    Raises:
        OpsError: it runs.
        Unreachable: the service manager does not answer.
    """
    live, role = Path(postgres.data_directory).resolve(), postgres.service
    working = servers_in(live)
    state = services.state(role)
    if working or state.comes_back:
        who = f"process {working[0].pid} works in {live}" if working else f"its service {role} runs ({state.told})"
        raise OpsError(
            f"the database server is not stopped: {who}",
            f"stop {services.names.get(role, role)} so that nothing starts it again, then run this again",
        )
    return read_written(postgres, live)


def read_written(postgres: Postgres, data: Path) -> FencedServer:
    """Read how far a stopped server got, from its control file."""
    if not (data / "PG_VERSION").exists():
        return FencedServer(None)
    found, problem = read_control(postgres, data)
    if problem:
        return FencedServer(data, problem=problem)
    with contextlib.suppress(KeyError, ValueError):
        return FencedServer(
            data,
            int(found["Latest checkpoint's TimeLineID"]),
            lsn_of(found["Latest checkpoint location"]),
            int(found["Database system identifier"]),
            "; ".join(found.get(name, "") for name in ("Database cluster state", "pg_control last modified")),
        )
    return FencedServer(data, problem="its control file lacks a line")
