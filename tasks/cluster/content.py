"""What a base backup is: of which cluster, from where to where in its WAL, and on which other backup it stands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from runbook.errors import OTHER_BACKUPS, VerificationFailed
from tasks.backups.catalogue import Backup
from tasks.wal.format.names import lsn_of

Form = Literal["full", "incremental"]


class ClusterContent(BaseModel):
    """The content of a manifest of the kind `cluster`. `base`: the backup that an incremental one stands on. A copy can
    be stopped anywhere after `stop_lsn`, the WAL up to there is in the backup itself. `next_xid` had not begun then,
    its epoch counted in. `bytes`: of the data directory that it becomes. `label`: its name in pgBackRest's repository,
    where that has it; the files here only tell of it then."""

    model_config = ConfigDict(frozen=True)
    form: Form
    base: str = ""
    system: int
    timeline: int
    start_lsn: str
    stop_lsn: str
    stopped: datetime
    next_xid: int
    server_version: int
    segment_bytes: int
    bytes: int
    database: str
    label: str = ""

    @property
    def stop(self) -> int:
        """`stop_lsn` as a number."""
        return lsn_of(self.stop_lsn)

    @property
    def start(self) -> int:
        """`start_lsn` as a number."""
        return lsn_of(self.start_lsn)

    @property
    def major(self) -> int:
        """18."""
        return self.server_version // 10000


def cluster_in(backup: Backup) -> ClusterContent:
    """What a base backup's manifest says of it.

    Raises:
        VerificationFailed: it cannot be read.
    """
    try:
        return ClusterContent.model_validate(backup.manifest.content)
    except ValidationError:
        raise VerificationFailed(f"{backup.name} has no readable content", OTHER_BACKUPS) from None


def lineage(backup: Backup, backups: Sequence[Backup]) -> list[Backup]:
    """A backup and those that it stands on, the full one first.

    Raises:
        VerificationFailed: one of them is gone.
    """
    known, found = {one.name: one for one in backups}, [backup]
    while base := cluster_in(found[0]).base:
        if base not in known or len(found) > len(known):
            raise VerificationFailed(
                f"{backup.name} stands on {base}, which is not in {backup.store.where}",
                f"the replica store may have it (source=copies); {OTHER_BACKUPS}",
            )
        found.insert(0, known[base])
    return found


def needed_by(kept: Sequence[Backup], backups: Sequence[Backup]) -> set[str]:
    """The names of backups without which one of `kept` cannot be restored."""
    known, needed = {one.name: one for one in backups}, set[str]()
    for backup in kept:
        one: Backup | None = backup
        while one and one.name not in needed:
            needed.add(one.name)
            one = known.get(cluster_in(one).base)
    return needed
