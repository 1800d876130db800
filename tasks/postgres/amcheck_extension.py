"""The extension amcheck in a database: whether it is there, and its installation.

https://www.postgresql.org/docs/current/amcheck.html
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres import Postgres, execute
from runbook.kinds import action, probe
from runbook.permit import Permit
from runbook.wait import until

INSTALL = "install extension"
EXTENSION = "amcheck"
REPLAY_SECONDS = 30.0


@dataclass(frozen=True)
class Extension:
    """Where amcheck is in a database: `schema` is "" where it is not installed.

    `replayed` is the time of the last commit that a standby has replayed, "" where it is none or has replayed none.
    """

    schema: str
    version: str
    available: str
    in_recovery: bool
    replayed: str


@probe
def find_amcheck(postgres: Postgres, database: str) -> Extension:
    """Whether it is installed, or could be.

    Raises:
        Unreachable: the server is down.
        OpsError: there is no such database.
    """
    return _read_extension(postgres, database)


def wait_for_amcheck(standby: Postgres, database: str) -> Extension:
    """Until a standby has replayed its installation on the primary.

    Raises:
        Unreachable: it has not within half a minute.
    """
    hint = "look with check-replication how far the standby is behind, then launch this again"
    what = f"the replay of CREATE EXTENSION amcheck on {standby.host}:{standby.port}"

    def installed() -> Extension | None:
        found = _read_extension(standby, database)
        return found if found.schema else None

    found = until(installed, what=what, seconds=REPLAY_SECONDS, every_seconds=0.2, hint=hint)
    assert found
    return found


def _read_extension(postgres: Postgres, database: str) -> Extension:
    with postgres.connect(database) as connection:
        row = execute(connection, _EXTENSION)[0]
    return Extension(str(row[0] or ""), str(row[1] or ""), str(row[2] or ""), bool(row[3]), str(row[4] or "")[:19])


_EXTENSION = """
SELECT (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = 'amcheck'),
       (SELECT extversion FROM pg_extension WHERE extname = 'amcheck'),
       (SELECT default_version FROM pg_available_extensions WHERE name = 'amcheck'), pg_is_in_recovery(),
       pg_last_xact_replay_timestamp()
"""


@action(idempotent=True)
def install_amcheck(permit: Permit, postgres: Postgres, database: str) -> None:
    """CREATE EXTENSION, where it is missing."""
    permit.require(INSTALL, f"{EXTENSION} in {database}")
    with postgres.connect(database) as connection:
        execute(connection, "CREATE EXTENSION IF NOT EXISTS amcheck")
