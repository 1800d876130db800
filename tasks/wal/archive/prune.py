"""Archived WAL that no base backup needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.backups.catalogue import Backup
from tasks.cluster.content import cluster_in
from tasks.cluster.origin import is_on
from tasks.wal.archive.archive import Archive, StoredSegment
from tasks.wal.format.names import Segment, Timeline

DELETE_WAL = "delete WAL"


@dataclass(frozen=True)
class OldWal:
    """Segments of a cluster that no kept base backup needs: all before the segment `before`, named without its
    timeline. `of`: the number of files in the archive; `in_use`: the number of the timeline in use."""

    system: int
    archive: Archive
    doomed: tuple[StoredSegment, ...]
    before: str
    of: int = 0
    in_use: int = 1

    @property
    def where(self) -> str:
        """The target of permits."""
        return f"{self.archive.place.where} before {self.before}"

    @property
    def bytes(self) -> int:
        """Their stored bytes."""
        return sum(one.bytes for one in self.doomed)


@probe
def find_old_wal(archive: Archive, system: int, kept: Sequence[Backup], window: timedelta, in_use: Timeline) -> OldWal:
    """Find the WAL that no base backup of `kept` needs, on any timeline. Histories stay. `in_use`: the timeline in use,
    which base backups of a branch that was left do not help.

    A recovery to any time in the last `window` (counted from the newest base backup) needs all WAL from the newest base
    backup before that on. If the newest verified one is older, from that one on; if none is verified, from the oldest
    on. An older base backup is restored to its end, and needs the WAL that it spans. If no base backup of the cluster
    is kept, nothing is deleted: its WAL may be all that is left.
    """
    own = sorted((one for one in kept if cluster_in(one).system == system), key=lambda one: one.manifest.taken)
    if not own:
        return OldWal(system, archive, (), "", in_use=in_use.number)
    contents = [cluster_in(one) for one in own]
    listing, bytes_ = archive.listing(), contents[0].segment_bytes
    followed = [one for one in own if is_on(in_use, cluster_in(one))]
    first = min(_first_needed(found, window) for found in (own, followed) if found) // bytes_
    spans = [range(content.start // bytes_, (content.stop - 1) // bytes_ + 1) for content in contents]
    files = [one for found in (listing.segments, listing.partials) for same in found.values() for one in same]

    def is_old(one: StoredSegment) -> bool:
        number = Segment.named(one.of, bytes_).number
        return number < first and not any(number in span for span in spans)

    doomed = tuple(sorted(filter(is_old, files), key=lambda one: one.of[8:]))
    return OldWal(system, archive, doomed, Segment(first, 1, bytes_).name[8:], len(files), in_use.number)


def _first_needed(own: Sequence[Backup], window: timedelta) -> int:
    """The LSN from which on a recovery to any time in the window needs all WAL, by base backups in their order."""
    verified = [one.manifest.taken for one in own if one.verified]
    since = min(own[-1].manifest.taken - window, verified[-1] if verified else own[0].manifest.taken)
    begin = max((one.manifest.taken for one in own if one.manifest.taken <= since), default=own[0].manifest.taken)
    return min(cluster_in(one).start for one in own if one.manifest.taken >= begin)


@action(of=lambda old: Act(DELETE_WAL, old.where), idempotent=True)
def delete_wal(old: OldWal) -> int:
    """Delete it, oldest first, so that a killed run leaves no gap for later base backups. A mark is written first, so
    that no archiver stores it again. Returns its bytes.

    Raises:
        OpsError: the store refuses (an object lock).
    """
    old.archive.note_pruned(old.doomed, old.in_use)
    failpoint("wal: pruning noted")
    for start in range(0, len(old.doomed), 100):
        old.archive.remove(old.doomed[start : start + 100])
    return old.bytes
