"""The death of a database server: every process of it killed with -9, and its data directory gone.

Its supervisor is not told: it tries to start the server again, as it would, and finds nothing to start.
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
from runbook.guard.permit import Permit
from runbook.kinds import action
from runbook.wait import until
from tasks.failover.fencing import look_for_processes
from tasks.faults.disposable import Fault, require_allowed
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address

ENDING = ".broken-by-a-drill"
END_SECONDS = 30.0


@action
def destroy_server(permit: Permit, env: Environment, postgres: Postgres) -> Fault:
    """Lose a server and its disk. What a killed run of this has left undone is done first.

    The directory goes before the processes die, so that a supervisor that starts the server at once finds none; what
    they acknowledge in between is lost with it, as on a disk that fails.

    Raises:
        OpsError: the environment is not disposable, or the server's files are not on this host.
    """
    require_allowed(env, permit, address(postgres))
    data = Path(postgres.data_directory)
    if not is_here(postgres.host) or not (data.exists() or _broken(data).exists()):
        raise OpsError(f"{data} is not on this host", "launch the drill on a worker of the database's host")
    began = datetime.now(UTC)
    finish_destroying(permit, env, postgres)
    data.rename(_broken(data))
    failpoint("fault: data directory away")
    finish_destroying(permit, env, postgres)
    what = f"every process of {address(postgres)} killed with -9, {data} removed"
    return Fault(what, began, datetime.now(UTC), {"server": address(postgres)})


def finish_destroying(permit: Permit, env: Environment, postgres: Postgres) -> bool:
    """The second half, where the first is done: its processes die, its files go. Whether there was something to do."""
    require_allowed(env, permit, address(postgres))
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
    """Those that were still there."""
    found, _ = look_for_processes(data)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found
