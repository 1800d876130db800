"""A lost database server: its processes are killed with -9, its data directory is deleted.

Its supervisor tries to restart it, and fails without a data directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.failover.fencing import look_for_processes
from tasks.faults.disposable import BREAK, Fault, require_disposable
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address

ENDING = ".broken-by-a-drill"
END_SECONDS = 30.0


@action(of=lambda postgres: Act(BREAK, address(postgres)))
def destroy_server(env: Environment, postgres: Postgres) -> Fault:
    """Lose a server and its disk. The second half of a killed run is completed first.

    The directory is renamed before the processes die, so that the supervisor cannot restart the server. Writes that are
    acknowledged in between are lost with it, like on a failed disk.

    Raises:
        OpsError: the environment is not disposable, or the server's files are not on this host.
    """
    require_disposable(env)
    data = Path(postgres.data_directory)
    if not is_here(postgres.host) or not (data.exists() or _broken(data).exists()):
        raise OpsError(f"{data} is not on this host", "run the drill on a worker of the database's host")
    began = datetime.now(UTC)
    _finish(postgres)
    data.rename(_broken(data))
    failpoint("fault: data directory away")
    _finish(postgres)
    what = f"every process of {address(postgres)} killed with -9, {data} removed"
    return Fault(what, began, datetime.now(UTC), {"server": address(postgres)})


@action(of=lambda postgres: Act(BREAK, address(postgres)))
def finish_destroying(env: Environment, postgres: Postgres) -> bool:
    """Complete what a killed run began: kill the processes, delete the files. Returns whether it had begun.

    Raises:
        OpsError: the environment is not disposable.
        Unreachable: the processes do not end.
    """
    require_disposable(env)
    return _finish(postgres)


def _finish(postgres: Postgres) -> bool:
    broken = _broken(Path(postgres.data_directory))
    if not broken.exists():
        return False
    until(lambda: not _killed(broken), what=f"the death of {address(postgres)}", seconds=END_SECONDS)
    failpoint("fault: processes killed")
    shutil.rmtree(broken)
    return True


def _broken(data: Path) -> Path:
    return data.with_name(data.name + ENDING)


def _killed(data: Path) -> list[int]:
    """Kill the processes that are left; returns them."""
    found, _ = look_for_processes(data)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found
