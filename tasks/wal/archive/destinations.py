"""Where an environment's WAL goes, and a round of shipping for a run that must have all of it there now."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from runbook.kinds import action
from tasks.backups.encryption import Key
from tasks.pgbackrest.backup import archive_in, archive_rest
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.place import place_of
from tasks.wal.archive.ship import Destination, Shipped, ship


def archive_of(
    env: Environment, which: Stores, system: int, of: str = "", *, patience_seconds: float = math.inf
) -> Archive:
    """The archive of a cluster of an environment (its own by default) in its first or second set of stores. A bucket is
    waited for no longer than `patience_seconds`.

    Raises:
        OpsError: it has no such set, or its address or a key is wrong.
    """
    if which == "backups" and env.has("wal") and env.wal.tool == "pgbackrest":
        return archive_in(env.wal, env.postgres)
    backups = env.stores(which)
    key = Key.of(backups.recipients, backups.identity.get_secret_value())
    return Archive(place_of(env, which, of or env.name, system, patience_seconds=patience_seconds), key)


def destinations_of(env: Environment) -> list[Destination]:
    """Where an environment's WAL goes."""
    return [Destination(which, partial(archive_of, env, which)) for which in get_args(Stores) if env.has(which)]


@action(idempotent=True)
def ship_now(env: Environment, which: Stores = "backups") -> Shipped:
    """Everything that the receiver has into one archive, also what is not a whole segment yet. The archiver may do the
    same at the same time: nothing is written over.

    Raises:
        OpsError, Unreachable: the receiver's directory or the archive do not answer.
    """
    if which == "backups" and env.wal.tool == "pgbackrest":
        archive_rest.work(env.postgres)
        return Shipped()
    return ship(Path(env.wal.directory), Destination(which, partial(archive_of, env, which)))
