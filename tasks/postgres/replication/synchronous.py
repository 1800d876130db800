"""Commits that wait for standbys, and a primary that continues without them.

https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.replication.status import parse_sync_names

ALONE = "let commits wait for no standby on"
RELOAD_SECONDS = 30.0


@dataclass(frozen=True)
class Synchrony:
    """The standbys that commits wait for: `names` is the setting (empty: none), `needed` of them must confirm,
    `connected` can confirm."""

    names: str
    needed: int
    connected: tuple[str, ...]

    @property
    def hangs(self) -> bool:
        """Whether a commit would wait until another standby connects."""
        return len(self.connected) < self.needed


@probe
def read_synchrony(postgres: Postgres) -> Synchrony:
    """See `synchrony`."""
    return synchrony(postgres)


def synchrony(postgres: Postgres) -> Synchrony:
    """The standbys that commits wait for now.

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


@action(of=lambda postgres: Act(ALONE, address(postgres)), idempotent=True)
def commit_alone(postgres: Postgres) -> Synchrony:
    """Let commits wait for no standby; waiting ones return. A failure from now on loses writes that no standby has.

    ALTER SYSTEM overrides the configuration file; `commit_together` resets it.

    Raises:
        OpsError: a source above ALTER SYSTEM sets it.
    """
    _reload(postgres, "ALTER SYSTEM SET synchronous_standby_names = ''")
    if (found := synchrony(postgres)).needed:
        raise OpsError(
            f"synchronous_standby_names of {address(postgres)} does not change: {found.names}",
            "remove it from the server's command line, then restart the server",
        )
    return found


@action(idempotent=True)
def commit_together(postgres: Postgres) -> Synchrony:
    """Let commits wait again for the standbys in the configuration file. Call it when they are connected.

    Call it on the standby too: a copy taken meanwhile has the override and would wait for no standby after promotion.

    Raises:
        Unreachable: the server is down.
        OpsError: it does not reload its configuration.
    """
    _reload(postgres, "ALTER SYSTEM RESET synchronous_standby_names")
    return synchrony(postgres)


_LOADED = "SELECT pg_conf_load_time()"
"""Of this session: the server forwards the reload to it after it has read the files."""


def _reload(postgres: Postgres, change: LiteralString) -> None:
    with postgres.connect() as connection:
        before = execute(connection, _LOADED)
        execute(connection, change)
        execute(connection, "SELECT pg_reload_conf()")
        try:
            until(lambda: execute(connection, _LOADED) != before, what="the reload", seconds=RELOAD_SECONDS)
        except Unreachable as error:
            raise OpsError(
                f"{address(postgres)} does not reload its configuration: {error.message}",
                "check pg_file_settings: a line with an error stops all others from being applied",
            ) from None


def address(postgres: Postgres) -> str:
    """`host:port`, as acts name a server."""
    return f"{postgres.host}:{postgres.port}"
