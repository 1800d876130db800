"""What killed runs left in a store's directory of this host: backups that are not whole, and what had been sent."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.host.space import find_workers, taken_by
from tasks.stores.directory import PARTIAL, SENT, DirectoryStore, told

REMOVE = "remove unfinished backup"


@dataclass(frozen=True)
class StoreLeftover:
    """A directory that no backup needs: it has no manifest, or its backup is in its store."""

    path: Path
    bytes: int


@probe
def find_leftovers(spool: Path, environment: str) -> tuple[StoreLeftover, ...]:
    """Of an environment whose lock is held: nobody is making them. Whole backups that wait to be sent are none.

    Raises:
        OpsError: the directory cannot be listed.
    """
    names = DirectoryStore(spool).unfinished(environment)
    paths = [spool / f"{PARTIAL}{environment}-{name}" for name in names]
    paths += sorted(spool.glob(f"{SENT}*")) if spool.is_dir() else []
    return tuple(StoreLeftover(path, taken_by(path).bytes) for path in paths)


@action(of=lambda one: Act(REMOVE, str(one.path)), idempotent=True)
def remove_leftover(one: StoreLeftover) -> bool:
    """Remove one of them; whether it is gone.

    Raises:
        OpsError: it cannot be removed, or a process works in it.
    """
    if why := find_workers([one.path]).get(one.path):
        raise OpsError(f"{one.path} is not deleted: {why}", "end that process if its run is over, then run this again")
    with told(one.path):
        if one.path.exists():
            shutil.rmtree(one.path)
    return not one.path.exists()
