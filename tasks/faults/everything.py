"""Database, Redis and application files lost at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.environment import Environment
from blocks.postgres.server import execute
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.wait import until
from tasks.faults.disposable import BREAK, Fault, require_disposable

SECONDS = 30.0
KILLED = ("backend", "frontend", "redis")


def everything(env: Environment) -> str:
    """Return the target of the act."""
    return f"database {env.postgres.database}, Redis and application files of {env.name}"


@action(of=lambda env: Act(BREAK, everything(env)))
def lose_everything(env: Environment) -> Fault:
    """Drop the database (on the standby too), delete the files of Redis and the application, kill their processes with
    -9. The supervisor restarts what it can.

    Raises:
        OpsError: the environment is not disposable, or its files are not on this host.
    """
    require_disposable(env)
    redis, files = Path(env.redis.data_directory), Path(env.application.directory)
    for path in (redis, files):
        if not path.is_dir():
            raise OpsError(f"{path} is not on this host", "run the drill on a worker of that host")
    began = datetime.now(UTC)
    until(lambda: _dropped(env), what=f"the drop of {env.postgres.database}", seconds=SECONDS)
    failpoint("fault: database dropped")
    until(lambda: _removed(env, (redis, files)), what="the loss of the files", seconds=SECONDS)
    what = f"database {env.postgres.database} dropped; {redis} and {files} removed; {', '.join(KILLED)} killed with -9"
    return Fault(what, began, datetime.now(UTC))


def _dropped(env: Environment) -> bool:
    name = sql.Identifier(env.postgres.database)
    try:
        with env.postgres.connect() as connection:
            execute(connection, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
    except psycopg.errors.ObjectInUse as error:  # a client has just connected again
        raise Unreachable(str(error).splitlines()[0]) from None
    return True


def _removed(env: Environment, places: tuple[Path, ...]) -> bool:
    """Kill and delete until nothing is left: a process may write meanwhile, or be restarted."""
    for role in env.services_in(KILLED):
        if pid := env.services.state(role).pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    return not any(place.exists() for place in places)
