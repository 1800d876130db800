"""Whether the archive has every segment from a point on, judged by names before anything is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.wal.archive.archive import Archive, ArchiveListing, StoredSegment, timeline_in
from tasks.wal.format.names import SEGMENT_BYTES, Segment, Timeline, lsn_text
from tasks.wal.format.pages import PAGE_BYTES


@dataclass(frozen=True)
class Link:
    """A segment of a history, and its file in the archive."""

    segment: Segment
    stored: StoredSegment

    @property
    def end(self) -> int:
        """The LSN at which it ends at most."""
        return self.segment.start + self.stored.end if self.stored.end else self.segment.end


@dataclass(frozen=True)
class Chain:
    """The segments from a point on, without a gap. `missing`: the first missing one, if the history continues after it
    (a gap); "" where the chain ends with the archive. `pruned`: the first that was deleted on purpose (no gap: only
    newer base backups reach what follows). `double`: has two contents. `damaged`: is marked as damaged (the last of the
    links). `behind`: the existing segments after that place."""

    timeline: Timeline
    links: tuple[Link, ...]
    missing: str = ""
    double: str = ""
    damaged: str = ""
    pruned: str = ""
    behind: tuple[Link, ...] = ()

    @property
    def end(self) -> int:
        """The LSN at which it ends at most; 0 for an empty chain."""
        return self.links[-1].end if self.links else 0

    def reaches(self, lsn: int) -> bool:
        """Whether it has the WAL before `lsn`. An unfinished segment is known up to its last byte that is not zero:
        the end of a record may be."""
        return bool(self.links) and self.end + (PAGE_BYTES if self.links[-1].stored.end else 0) >= lsn

    @property
    def trouble(self) -> str:
        """Why the chain is broken; "" if it is not."""
        if self.pruned:
            return ""
        later = ""
        if self.behind:
            later = f"; {len(self.behind)} later ones exist, up to {lsn_text(self.behind[-1].end)}"
        if self.double:
            return f"{self.double} has two contents in the archive{later}"
        if self.damaged:
            return f"{self.damaged} is damaged in the archive{later}"
        return f"{self.missing} is missing in the archive{later}" if self.missing else ""

    @property
    def end_reason(self) -> str:
        """Why the chain ends: `trouble`, or a deletion as old."""
        return self.trouble or (f"WAL from {self.pruned} on was deleted by prune-backups" if self.pruned else "")

    @property
    def text(self) -> str:
        """Its length and its end."""
        return f"{len(self.links)} segments up to {lsn_text(self.end)} on timeline {self.timeline.number}"


def chain_from(listing: ArchiveListing, timeline: Timeline, lsn: int, bytes_: int = SEGMENT_BYTES) -> Chain:
    """Follow a history from the segment of `lsn` on."""
    links, number = list[Link](), lsn // bytes_
    newest = _newest(listing, timeline, bytes_)

    def broken(**why: str) -> Chain:
        later = (_link(listing, timeline, one, bytes_)[0] for one in range(number + 1, newest + 1))
        return Chain(timeline, tuple(links), **why, behind=tuple(link for link in later if link))

    while number <= newest:
        link, double = _link(listing, timeline, number, bytes_)
        if link is None:
            wanted = timeline.candidates(number, bytes_)[0].name
            if not double and any(listing.is_pruned(one.name) for one in timeline.candidates(number, bytes_)):
                return broken(pruned=wanted)
            return broken(double=wanted) if double else broken(missing=wanted)
        links.append(link)
        if link.stored.damaged and number < newest:
            return broken(damaged=link.segment.name)
        if link.stored.end and number < newest:
            return broken(missing=f"the rest of {link.segment.name}")
        number += 1
    return Chain(timeline, tuple(links))


def _link(listing: ArchiveListing, timeline: Timeline, number: int, bytes_: int) -> tuple[Link | None, bool]:
    """The file that goes furthest along the history, finished or the longest partial one; and whether there are two
    contents. A damaged one is used only without another. A finished one of an older timeline ends where that timeline
    was left: while the newer one is still being written, later commits are there alone."""
    links = list[Link]()
    for segment in timeline.candidates(number, bytes_):
        if there := intact(listing.segments.get(segment.name, ())) or listing.partials.get(segment.name):
            links.append(Link(segment, there[-1]))
    if not links:
        return None, False
    best = max(links, key=lambda link: min(link.end, timeline.left_at(link.segment.timeline) or 0))
    contents = {one.sha256 for one in intact(listing.segments.get(best.segment.name, ()))}
    return (None, True) if len(contents) > 1 else (best, False)


def intact(found: Sequence[StoredSegment]) -> Sequence[StoredSegment]:
    """The undamaged ones; all, if every one is damaged."""
    return [one for one in found if not one.damaged] or found


def _newest(listing: ArchiveListing, timeline: Timeline, bytes_: int) -> int:
    """The number of the last segment of a history."""
    found = (Segment.named(name, bytes_) for name in (*listing.segments, *listing.partials))
    return max((one.number for one in found if one in timeline.candidates(one.number, bytes_)), default=-1)


@probe
def read_chain(archive: Archive, lsn: int, timeline: int, segment_bytes: int = SEGMENT_BYTES) -> Chain:
    """The archive's segments from `lsn` on, along the history of a timeline.

    Raises:
        OpsError, Unreachable: the archive cannot be listed, or has no such timeline.
    """
    listing = archive.listing()
    found = timeline_in(archive, listing, timeline)
    return chain_from(listing, found, lsn, segment_bytes)


def require_begun(chain: Chain, backup: str) -> None:
    """Check that there is WAL after a base backup.

    Raises:
        OpsError: there is none.
    """
    if not chain.links:
        raise OpsError(
            f"the archive has no WAL after {backup}: {chain.trouble or 'none has arrived'}",
            "check that the WAL receiver and the archiver run; only the end of the backup itself can be restored",
        )
