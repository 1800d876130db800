"""Commits that wait for a standby, and a primary that has to do without one for a time.

https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.replication.status import parse_sync_names

ALONE = "let commits wait for no standby on"
RELOAD_SECONDS = 30.0


@dataclass(frozen=True)
class Synchrony:
    """For whom commits wait: `names` as the server has it ("" for nobody), how many of them must confirm, and which are
    connected and confirm."""

    names: str
    needed: int
    connected: tuple[str, ...]

    @property
    def hangs(self) -> bool:
        """Whether a commit would wait until somebody connects."""
        return len(self.connected) < self.needed


@probe
def read_synchrony(postgres: Postgres) -> Synchrony:
    """See `synchrony`."""
    return synchrony(postgres)


def synchrony(postgres: Postgres) -> Synchrony:
    """For whom commits wait now.

    Raises:
        Unreachable: the server is down.
    """
    with postgres.connect() as connection:
        names, connected = execute(connection, _SYNCHRONY)[0]
    return Synchrony(str(names), parse_sync_names(str(names)).needed, tuple(connected))


_SYNCHRONY = """
SELECT current_setting('synchronous_standby_names'),
       ARRAY(SELECT application_name FROM pg_stat_replication
             WHERE state = 'streaming' AND sync_state IN ('sync', 'quorum') ORDER BY 1)
"""


@action(idempotent=True)
def commit_alone(permit: Permit, postgres: Postgres) -> Synchrony:
    """From now on commits wait for nobody, and those that wait return: what fails now loses what no standby has.

    The setting of the configuration file is overridden (ALTER SYSTEM), not changed; `commit_together` takes that back.

    Raises:
        OpsError: something above ALTER SYSTEM sets it.
    """
    permit.require(ALONE, address(postgres))
    _reload(postgres, "ALTER SYSTEM SET synchronous_standby_names = ''")
    if (found := synchrony(postgres)).needed:
        raise OpsError(
            f"synchronous_standby_names of {address(postgres)} stays as it is: {found.names}",
            "it stands on the server's command line: take it out there, and restart the server",
        )
    return found


@action(idempotent=True)
def commit_together(postgres: Postgres) -> Synchrony:
    """Commits wait again for whom the server's configuration file names: call it when they are connected, and on the
    standby too: a copy that was taken meanwhile has the override, and would go on alone after its promotion.

    Raises:
        Unreachable: the server is down.
        OpsError: it does not read its configuration again.
    """
    _reload(postgres, "ALTER SYSTEM RESET synchronous_standby_names")
    return synchrony(postgres)


_LOADED = "SELECT pg_conf_load_time()"
"""Of this session, to which the server passes the reload on when it has read the files itself."""


def _reload(postgres: Postgres, change: LiteralString) -> None:
    with postgres.connect() as connection:
        before = execute(connection, _LOADED)
        execute(connection, change)
        execute(connection, "SELECT pg_reload_conf()")
        try:
            until(lambda: execute(connection, _LOADED) != before, what="the reload", seconds=RELOAD_SECONDS)
        except Unreachable as error:
            raise OpsError(
                f"{address(postgres)} does not read its configuration: {error.message}",
                "look at pg_file_settings: a line with an error keeps all others from being applied",
            ) from None


def address(postgres: Postgres) -> str:
    """`host:port`, as acts name a server."""
    return f"{postgres.host}:{postgres.port}"
