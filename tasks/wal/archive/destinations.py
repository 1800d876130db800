"""The archives of an environment's WAL, and a round of shipping for a run that needs all of it there now."""

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
from tasks.wal.archive.received import Mark
from tasks.wal.archive.ship import ArchivedContent, Destination, Shipped, ship


def archive_of(
    env: Environment, which: Stores, system: int, of: str = "", *, patience_seconds: float = math.inf
) -> Archive:
    """The archive of a cluster of an environment (`of`, by default this one) in `backups` or `copies`. It waits at most
    `patience_seconds` for a bucket.

    Raises:
        OpsError: these stores are not configured, or their address or key is wrong.
    """
    if which == "backups" and env.has("wal") and env.wal.tool == "pgbackrest":
        return archive_in(env.wal, env.postgres)
    backups = env.stores(which)
    key = Key.of(backups.recipients, backups.identity.get_secret_value())
    return Archive(place_of(env, which, of or env.name, system, patience_seconds=patience_seconds), key)


def destinations_of(env: Environment) -> list[Destination]:
    """The archives of an environment's WAL."""
    return [Destination(which, partial(archive_of, env, which)) for which in get_args(Stores) if env.has(which)]


@action(idempotent=True)
def ship_now(env: Environment, which: Stores = "backups") -> Shipped:
    """Ship everything that the receiver has into one archive, its unfinished segment included. The archiver may run at
    the same time: no file is overwritten.

    Raises:
        OpsError, Unreachable: the receiver's directory or the archive cannot be accessed.
    """
    if which == "backups" and env.wal.tool == "pgbackrest":
        archive_rest.work(env.postgres)
        return Shipped()
    directory = Path(env.wal.directory)
    seen = _seen.setdefault((env.name, which, directory), {})
    for mark in [mark for mark in seen if not (directory / mark[0]).exists()]:
        del seen[mark]
    return ship(directory, Destination(which, partial(archive_of, env, which), seen))


_seen: dict[tuple[str, Stores, Path], dict[Mark, ArchivedContent]] = {}
"""A run ships several times, and the receiver keeps a gigabyte of archived WAL, which is read once. The archive is
listed each time."""
