"""Where lost writes may still be: a kept old database, a kept data directory, a server that somebody started."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres import Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.kinds import probe
from runbook.report import Report
from runbook.wait import until
from tasks.cluster.instance import Instance, prepare_instance, put_away, root_for, running, servers_in, sweep_instance
from tasks.cluster.swap import SUPERSEDED
from tasks.postgres.superseded import find_superseded

NEWEST = "newest"
SALVAGING = ".salvaging"
UNDONE_BY = "undo-restore"
START_SECONDS = 120
_ADDRESS = re.compile(r"(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})(?:/(?P<database>.+))?")


@dataclass(frozen=True)
class Source:
    """A database to compare with. `since`: the transaction of the live server in which it was replaced, "" where that
    is not known."""

    told: str
    postgres: Postgres
    database: str
    since: str = ""


@contextlib.contextmanager
def opened(report: Report, env: Environment, wanted: str) -> Iterator[Source]:
    """The source that an operator means; a kept data directory is started as a private instance while the block runs.

    Raises:
        OpsError: there is none of that name.
        Unreachable: it does not answer, or does not start.
    """
    wanted = wanted.strip()
    directories = _kept_directories(env)
    if match := _ADDRESS.fullmatch(wanted):
        block = env.postgres.model_copy(update={"host": match["host"].strip("[]"), "port": int(match["port"])})
        yield Source(wanted, block, match["database"] or env.postgres.database)
        return
    databases = {old.name: old for old in find_superseded(env.postgres)}
    found = sorted([*databases, *directories], key=lambda name: name[-15:])
    chosen = found[-1] if wanted == NEWEST and found else wanted
    report.pin("source", chosen)
    if chosen in databases:
        # What an undo put aside was made from a backup: what differs in it may be older than what is live.
        undone = databases[chosen].backup == UNDONE_BY
        since = "" if undone else read_replaced(env.postgres, chosen)
        yield Source(f"database {chosen}", env.postgres, chosen, since)
    elif chosen in directories:
        with _started(report, env, Path(chosen)) as block:
            yield Source(f"data directory {chosen}", block, env.postgres.database)
    else:
        there = ", ".join(reversed(found)) or "none at all"
        raise OpsError(f"there is no kept database or data directory “{wanted[:80]}”",
                       f"there are, newest first: {there}; a running server is named host:port/database")  # fmt: skip


def _kept_directories(env: Environment) -> list[str]:
    live = Path(env.postgres.data_directory)
    found = {path for one in {live, live.resolve()} for path in one.parent.glob(f"{one.name}{SUPERSEDED}*")}
    return sorted(str(path) for path in found if path.is_dir())


@contextlib.contextmanager
def _started(report: Report, env: Environment, directory: Path) -> Iterator[Postgres]:
    """Its own files are used: it recovers from its crash, if it had one, and is stopped again. No row changes."""
    root = root_for(env.postgres, SALVAGING)
    until(lambda: not servers_in(directory), what=f"the end of the server that works in {directory}", seconds=30,
          hint="a run that was killed had started it, or somebody did: stop it, then launch this again")  # fmt: skip
    sweep_instance(root)
    instance = prepare_instance(env.postgres, root)
    report.at_end(lambda: put_away(instance))
    instance.data.symlink_to(directory)
    with running(instance, None):
        hint = "it may be of another major version, or damaged: start it by hand and read what it says"
        until(lambda: _answers(instance), what=f"the start of {directory}", seconds=START_SECONDS, hint=hint)
        yield instance.postgres


def _answers(instance: Instance) -> bool:
    try:
        instance.postgres.connect().close()
    except Unreachable:
        return False
    return True


@probe
def read_replaced(postgres: Postgres, kept: str) -> str:
    """The transaction that gave a kept database its name: of its row and its label the older one, since either may have
    been changed later."""
    with postgres.connect() as connection:
        rows = execute(connection, _REPLACED, kept)
    return str(rows[0][0]) if rows else ""


_REPLACED = """
WITH kept AS (SELECT oid, xmin AS version FROM pg_database WHERE datname = %s)
SELECT version::text FROM (
    SELECT version FROM kept
    UNION ALL
    SELECT d.xmin FROM pg_shdescription d JOIN kept ON kept.oid = d.objoid WHERE d.classoid = 'pg_database'::regclass
) AS found ORDER BY age(version) DESC LIMIT 1
"""
