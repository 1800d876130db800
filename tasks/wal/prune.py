"""Archived WAL that no base backup needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runbook.kinds import action, probe
from runbook.permit import Permit
from tasks.catalogue import Backup
from tasks.cluster.content import cluster_in
from tasks.wal.archive import Archive, Stored
from tasks.wal.names import Segment

DELETE_WAL = "delete WAL"


@dataclass(frozen=True)
class OldWal:
    """Segments of a cluster before the first that a kept base backup needs. `before` is the name of that one, without
    its timeline."""

    system: int
    archive: Archive
    doomed: tuple[Stored, ...]
    before: str

    @property
    def where(self) -> str:
        """For permits."""
        return f"{self.archive.place.where} before {self.before}"

    @property
    def bytes(self) -> int:
        """As stored."""
        return sum(one.bytes for one in self.doomed)


@probe
def find_old_wal(archive: Archive, system: int, kept: Sequence[Backup]) -> OldWal:
    """What lies before the beginning of the oldest base backup of `kept`, on whatever timeline: histories stay.

    Nothing, where no base backup of the cluster is kept: its WAL may be all that is left of it.
    """
    own = [content for content in map(cluster_in, kept) if content.system == system]
    if not own:
        return OldWal(system, archive, (), "")
    listing, bytes_ = archive.listing(), own[0].segment_bytes
    first = min(content.start for content in own) // bytes_
    files = [one for found in (listing.segments, listing.partials) for same in found.values() for one in same]
    doomed = tuple(
        sorted((one for one in files if Segment.named(one.of, bytes_).number < first), key=lambda one: one.of[8:])
    )
    return OldWal(system, archive, doomed, Segment(first, 1, bytes_).name[8:])


@action(idempotent=True)
def delete_wal(permit: Permit, old: OldWal) -> int:
    """Remove it, oldest first: killed in between, what is left is without a gap. Returns its bytes.

    Raises:
        OpsError: the store refuses (an object lock).
    """
    permit.require(DELETE_WAL, old.where)
    for start in range(0, len(old.doomed), 100):
        old.archive.remove(old.doomed[start : start + 100])
    return old.bytes
