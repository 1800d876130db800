"""The content of a base backup: its cluster, its range of WAL, and the backup that it depends on."""

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
    """The content of a manifest of the kind `cluster`.

    `base`: the backup that an incremental one depends on. A recovery can stop anywhere after `stop_lsn`; the backup has
    the WAL up to there. `next_xid`: the first transaction ID, with its epoch, that had not begun then. `bytes`: of the
    restored data directory. `label`: its name in pgBackRest's repository, which then has the data. `databases`: those
    of the cluster at its end, without templates; none where they were not recorded."""

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
    databases: tuple[str, ...] = ()

    @property
    def has_database(self) -> bool:
        """Return True if it has `database`, or its databases were not recorded."""
        return not self.databases or self.database in self.databases

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
    """The content in a base backup's manifest.

    Raises:
        VerificationFailed: it cannot be read.
    """
    try:
        return ClusterContent.model_validate(backup.manifest.content)
    except ValidationError:
        raise VerificationFailed(f"{backup.name} has no readable content", OTHER_BACKUPS) from None


def lineage(backup: Backup, backups: Sequence[Backup]) -> list[Backup]:
    """A backup and those that it depends on, the full one first.

    Raises:
        VerificationFailed: one of them is missing.
    """
    known, found = {one.name: one for one in backups}, [backup]
    while base := cluster_in(found[0]).base:
        if base not in known or len(found) > len(known):
            raise VerificationFailed(
                f"{backup.name} depends on {base}, which is missing in {backup.store.where}",
                f"the replica store may have it (source=copies); {OTHER_BACKUPS}",
            )
        found.insert(0, known[base])
    return found


def needed_by(kept: Sequence[Backup], backups: Sequence[Backup]) -> set[str]:
    """The names of the backups that restoring `kept` needs."""
    known, needed = {one.name: one for one in backups}, set[str]()
    for backup in kept:
        one: Backup | None = backup
        while one and one.name not in needed:
            needed.add(one.name)
            one = known.get(cluster_in(one).base)
    return needed
