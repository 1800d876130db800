"""The archive of one cluster's WAL. Every file is compressed, optionally encrypted, and named with the SHA-256 of its
content: each fetch is proven, and two different contents of one segment are detected.

    000000010000000000000003-<sha256>.zst[.age]                  a finished segment
    000000010000000000000003.partial.00A3F2C8-<sha256>.zst[.age] an unfinished one, up to that byte
    00000002.history-<sha256>.zst[.age]                          the history of a timeline
    000000010000000000000003-<sha256>.zst[.age].damaged          a mark: the WAL in that file is damaged
    000000010000000000000003.pruned                              a mark: the timeline's segments up to that one were
    deleted
    00000007.00000004-00000005.in_use                            a mark, the seventh: timeline 4 takes the writes, and 5
    was the highest one

Earlier versions compressed with gzip (`.gz` instead of `.zst`). Those files stay as they are, and count the same.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import IO

import pyrage

from runbook.errors import OpsError, VerificationFailed
from tasks.backups import codec
from tasks.backups.encryption import ENDING, Key, decrypted, encrypted
from tasks.wal.archive.place import ArchivePlace
from tasks.wal.format.header import HEADER, read_header
from tasks.wal.format.names import MOST_SEGMENT_BYTES, SEGMENT_BYTES, Timeline

_NAME = re.compile(
    r"(?:(?P<segment>[0-9A-F]{24})(?:\.partial\.(?P<end>[0-9A-F]{8}))?|(?P<history>[0-9A-F]{8})\.history)"
    r"-(?P<sha256>[0-9a-f]{64})\.(?:zst|gz)(?:\.age)?"
)
_BLOCK = 1 << 20
_HISTORY_BYTES = 1 << 20
OTHER_COPIES = "find another copy: in the replica store (source=copies), in the receiver's directory"
DAMAGED = ".damaged"
_PRUNED = re.compile(r"(?P<segment>[0-9A-F]{24})\.pruned")
_IN_USE = re.compile(r"(?P<number>[0-9]{8})\.(?P<timeline>[0-9A-F]{8})-(?P<highest>[0-9A-F]{8})\.in_use")


@dataclass(frozen=True)
class StoredSegment:
    """One file of the archive. `of`: the name of the segment or history; `end`: the end of a partial segment, otherwise
    0; `damaged`: its SHA-256 is right, but its WAL does not decode."""

    name: str
    of: str
    sha256: str
    bytes: int
    end: int = 0
    damaged: bool = False


@dataclass(frozen=True, order=True)
class BranchMark:
    """A record of the timeline that took the writes from then on, after a promotion, a swap or its undo. `number`:
    their order; `highest`: the highest timeline at that time. Those up to it that are not in the history of `timeline`
    were left."""

    number: int
    timeline: int
    highest: int


@dataclass(frozen=True)
class ArchiveListing:
    """The content of an archive: finished files by segment (more than one: they differ), partial ones by segment, and
    histories by timeline. `pruned`: by timeline (eight digits), the newest segment that was deleted as old. `branch`:
    the newest record of the timeline in use."""

    segments: dict[str, tuple[StoredSegment, ...]]
    partials: dict[str, tuple[StoredSegment, ...]]
    histories: dict[int, tuple[StoredSegment, ...]]
    pruned: dict[str, str] = field(default_factory=dict)
    branch: BranchMark | None = None

    def is_pruned(self, segment: str) -> bool:
        """Whether a missing segment was deleted on purpose: it is not stored again, and is no gap. That holds only for
        the timeline of the mark: another one may begin earlier."""
        return segment <= self.pruned.get(segment[:8], "")

    @property
    def timelines(self) -> set[int]:
        """All timelines with any file."""
        return {*self.histories, *(int(name[:8], 16) for name in (*self.segments, *self.partials))}

    @property
    def bytes(self) -> int:
        """The stored bytes of all finished segments."""
        return sum(one.bytes for found in self.segments.values() for one in found)


def read_unpacked(of: str, stream: IO[bytes]) -> bytes:
    """Read a segment or a history from a stream that decompresses it; a segment's size is in its header.

    Raises:
        codec.UNREADABLE: it is damaged, cut off or oversized.
    """
    if of.endswith(".history"):
        return codec.bounded(stream, _HISTORY_BYTES).read()
    head = stream.read(HEADER.size)
    try:
        most = read_header(head, of).segment_bytes
    except VerificationFailed:
        most = SEGMENT_BYTES
    return head + codec.bounded(stream, most - len(head)).read()


@dataclass(frozen=True)
class Archive:
    """One cluster's WAL in one place."""

    place: ArchivePlace
    key: Key

    def listing(self) -> ArchiveListing:
        """List the archive.

        Raises:
            OpsError, Unreachable: it cannot be listed.
        """
        segments, partials = defaultdict[str, list[StoredSegment]](list), defaultdict[str, list[StoredSegment]](list)
        histories, names = defaultdict[int, list[StoredSegment]](list), self.place.names()
        for name, size in names.items():
            if not (match := _NAME.fullmatch(name)):
                continue
            if match["history"]:
                one = StoredSegment(name, f"{match['history']}.history", match["sha256"], size)
                histories[int(match["history"], 16)].append(one)
            elif match["end"]:
                partials[match["segment"]].append(
                    StoredSegment(name, match["segment"], match["sha256"], size, int(match["end"], 16))
                )
            else:
                one = StoredSegment(name, match["segment"], match["sha256"], size, damaged=name + DAMAGED in names)
                segments[match["segment"]].append(one)
        return ArchiveListing(
            {name: tuple(found) for name, found in segments.items()},
            {name: tuple(sorted(found, key=lambda one: one.end)) for name, found in partials.items()},
            {number: tuple(found) for number, found in histories.items()},
            pruned_in(names),
            _branch_in(names),
        )

    def put(self, of: str, content: bytes, *, end: int = 0) -> StoredSegment:
        """Store a segment (`end`: unfinished, up to there) or a history."""
        return self.put_packed(of, hashlib.sha256(content).hexdigest(), codec.compress(content), end=end)

    def put_packed(self, of: str, digest: str, packed: bytes, *, end: int = 0) -> StoredSegment:
        """As `put`, for a content that was compressed before. `digest`: the SHA-256 of the content."""
        partial = f".partial.{end:08X}" if end else ""
        name = f"{of}{partial}-{digest}{codec.ENDING}" + (ENDING if self.key.recipients else "")
        self.place.put(name, encrypted(packed, self.key) if self.key.recipients else packed, lasting=not end)
        return StoredSegment(name, of, digest, len(packed), end)

    def get(self, stored: StoredSegment) -> bytes:
        """A file's content, proven by the SHA-256 in its name.

        Raises:
            VerificationFailed: it is missing or altered.
            OpsError, Unreachable: it cannot be read, or there is no key.
        """
        try:
            content = self.place.get(stored.name)
        except VerificationFailed:
            if found := self._replaced(stored):
                return found
            raise
        try:
            packed = decrypted(content, self.key) if stored.name.endswith(ENDING) else content
            with codec.reader(io.BytesIO(packed), MOST_SEGMENT_BYTES) as stream:
                found = read_unpacked(stored.of, stream)
        except codec.Oversized as error:
            raise VerificationFailed(f"{stored.of} in {self.place.where} is damaged: {error}", OTHER_COPIES) from None
        except (*codec.UNREADABLE, pyrage.DecryptError):
            found = b""
        if hashlib.sha256(found).hexdigest() != stored.sha256:
            raise VerificationFailed(
                f"{stored.of} in {self.place.where} is damaged: its SHA-256 differs",
                OTHER_COPIES,
            )
        return found

    def _replaced(self, stored: StoredSegment) -> bytes:
        """What an unfinished segment had, from the longer one that replaced it since it was listed, and that begins
        with the same bytes; b"" where there is none."""
        if not stored.end:
            return b""
        listing = self.listing()
        for one in (*listing.segments.get(stored.of, ()), *listing.partials.get(stored.of, ())):
            if one.end == 0 or one.end > stored.end:
                try:
                    longer = self.get(one)
                except VerificationFailed:  # another one may have it
                    continue
                begins = longer[: stored.end].ljust(len(longer), b"\0")
                if hashlib.sha256(begins).hexdigest() == stored.sha256:
                    return begins
        return b""

    def remove(self, doomed: Sequence[StoredSegment]) -> None:
        """Delete files, with their marks."""
        marks = [one.name + DAMAGED for one in doomed if one.damaged]
        self.place.remove([*marks, *(one.name for one in doomed)])

    def mark(self, stored: StoredSegment) -> StoredSegment:
        """Mark that the WAL of a segment's file does not decode: the file stays as evidence, and an intact copy may be
        stored too.

        Raises:
            OpsError, Unreachable: it cannot be written.
        """
        self.place.put(stored.name + DAMAGED, b"this WAL does not decode\n", lasting=False)
        return replace(stored, damaged=True)

    def note_in_use(self, timeline: int, left: Iterable[int] = ()) -> None:
        """Record that this timeline takes the writes from now on, and that those in `left` do not. The newest record
        counts; one that says the same is not repeated.

        Raises:
            OpsError, Unreachable: it cannot be written.
        """
        listing = self.listing()
        last, highest = listing.branch, max({timeline, *left, *listing.timelines})
        if last and last.timeline == timeline and last.highest >= highest:
            return
        number = last.number + 1 if last else 1
        name = f"{number:08d}.{timeline:08X}-{highest:08X}.in_use"
        self.place.put(name, f"timeline {timeline} is in use\n".encode(), lasting=False)

    def note_pruned(self, doomed: Sequence[StoredSegment], in_use: int) -> None:
        """Mark that these are deleted on purpose. Call it before the deletion. An unfinished segment of the timeline
        `in_use` does not count: it is stored again when it is finished.

        Raises:
            OpsError, Unreachable: it cannot be written.
        """
        listing = self.listing()
        live = f"{in_use:08X}"
        newest = dict[str, str]()
        for one in doomed:
            if not (one.end and one.of.startswith(live)):
                newest[one.of[:8]] = max(one.of, newest.get(one.of[:8], ""))
        for timeline, segment in newest.items():
            if not listing.is_pruned(segment):
                self.place.put(
                    f"{segment}.pruned", b"the WAL up to here was deleted: no base backup needs it\n", lasting=False
                )
                if older := listing.pruned.get(timeline):
                    self.place.remove([f"{older}.pruned"])


def pruned_in(names: Iterable[str]) -> dict[str, str]:
    """See `Listing.pruned`, from the names of the files of an archive."""
    found = dict[str, str]()
    for name in names:
        if match := _PRUNED.fullmatch(name):
            found[name[:8]] = max(match["segment"], found.get(name[:8], ""))
    return found


def _branch_in(names: Iterable[str]) -> BranchMark | None:
    marks = (_IN_USE.fullmatch(name) for name in names)
    found = (BranchMark(int(one["number"]), int(one["timeline"], 16), int(one["highest"], 16)) for one in marks if one)
    return max(found, default=None)


def timeline_in(archive: Archive, listing: ArchiveListing, number: int) -> Timeline:
    """A timeline of the archive with its history. `tasks.wal.branch` finds the number of the one in use.

    Raises:
        OpsError: there is no such timeline.
        VerificationFailed: its history is damaged, or there are two.
    """
    if number == 1:
        return Timeline(1)
    found = listing.histories.get(number, ())
    if not found:
        there = ", ".join(map(str, sorted({1, *listing.histories})))
        raise OpsError(f"the archive has no history of timeline {number}", f"timelines with one: {there}")
    if len(found) > 1:
        raise VerificationFailed(
            f"the archive has two histories of timeline {number}",
            "find out which server is the right one, and move the other's history away: two servers were promoted to "
            "it",
        )
    return Timeline.read(number, archive.get(found[0]).decode(errors="replace"))


def written(content: bytes) -> int:
    """The beginning of its trailing zeros. Block by block: `rstrip` alone takes 40 ms for 16 MB."""
    end = len(content)
    while end >= _BLOCK and content[end - _BLOCK : end] == bytes(_BLOCK):
        end -= _BLOCK
    begin = max(0, end - _BLOCK)
    return begin + len(content[begin:end].rstrip(b"\0"))
