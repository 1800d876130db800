"""Shipping of the receiver's directory into the archive, file by file: no file is overwritten, and each file's header
is checked first."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from tasks.wal.archive.archive import DAMAGED, Archive, ArchiveListing, StoredSegment, pruned_in, written
from tasks.wal.format.header import HEADER, read_header, require_own
from tasks.wal.format.names import HISTORY, PARTIAL, SEGMENT, Segment

KEEP_SEGMENTS = 64
"""Finished segments that stay in the receiver's directory: a standby may ask for them."""


@dataclass(frozen=True)
class Shipped:
    """One round: the files put into the archive, the refused ones and why, and the newest archived segment."""

    put: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    newest: str = ""


@dataclass
class Destination:
    """One archive per cluster, and its known content. `seen`: archived files."""

    name: str
    archive_of: Callable[[int], Archive]
    seen: set[tuple[str, int, int]] = field(default_factory=set)
    _known: dict[int, tuple[Archive, ArchiveListing]] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget the known content: it is listed again."""
        self.seen.clear()
        self._known.clear()

    def known(self, system: int) -> tuple[Archive, ArchiveListing]:
        """A cluster's archive, its content at the first listing, and what was added since."""
        if system not in self._known:
            archive = self.archive_of(system)
            self._known[system] = (archive, archive.listing())
        return self._known[system]


def ship(directory: Path, destination: Destination, *, partial: bool = True) -> Shipped:
    """Put every file of a directory that the archive lacks into it, oldest first.

    Raises:
        OpsError, Unreachable: the directory or the archive cannot be accessed. The next run continues.
    """
    put, refused = list[str](), list[str]()
    files = _files(directory)
    wanted = [path for path in files if SEGMENT.fullmatch(path.name) or HISTORY.fullmatch(path.name)]
    wanted += [path for path in files if PARTIAL.fullmatch(path.name)] if partial else []
    for path in wanted:
        with contextlib.suppress(FileNotFoundError):  # finished and renamed, or deleted, since the listing
            found = path.stat()
            mark = (path.name, found.st_size, found.st_mtime_ns)
            if mark in destination.seen:
                continue
            try:
                if _ship_one(directory, path, destination):
                    put.append(path.name)
                    failpoint("wal: put")
            except VerificationFailed as error:
                refused.append(error.message)  # checked again in the next round
            else:
                destination.seen.add(mark)
    segments = [path.name for path in files if SEGMENT.fullmatch(path.name)]
    return Shipped(tuple(put), tuple(refused), max(segments, default="", key=lambda name: (name[8:], name[:8])))


def _ship_one(directory: Path, path: Path, destination: Destination) -> bool:
    """Put one file. Returns whether it was added now.

    Raises:
        VerificationFailed: its content does not match its name, or the archive has other content of that name.
    """
    content = _read(path)
    if HISTORY.fullmatch(path.name):
        archive, listing = destination.known(_system_of(directory))
        there = [one.sha256 for one in listing.histories.get(_tli(path), ())]
        return _put_new(archive, path.name, content, there) is not None
    header = read_header(content, path.name)
    archive, listing = destination.known(header.system)
    segment = Segment.named(path.name[:24], header.segment_bytes)
    stored = listing.segments.get(segment.name, ())
    there = [one.sha256 for one in stored]
    if not stored and listing.is_pruned(segment.name):
        return False
    if PARTIAL.fullmatch(path.name):
        return not there and _put_partial(archive, listing, segment, header.system, content)
    require_own(content, segment, header.system)
    if stored and all(one.damaged for one in stored) and hashlib.sha256(content).hexdigest() not in there:
        there = []  # an intact copy is stored next to a damaged one
    put = _put_new(archive, segment.name, content, there)
    if put is None:
        return False
    is_late = any(name[8:] >= segment.name[8:] for name in listing.segments)
    listing.segments[segment.name] = (*stored, put)
    old = listing.partials.pop(segment.name, ())
    with contextlib.suppress(OpsError):  # an object lock keeps them: they do no harm
        archive.remove(old)
    if is_late and archive.listing().is_pruned(segment.name):  # a prune marked it after the listing was read
        with contextlib.suppress(OpsError):
            archive.remove([put])
        return False
    return True


def _read(path: Path) -> bytes:
    """A file's content. It reads an unfinished file twice, and returns what both reads agree on: a page read before it
    is written, followed by one read after, would look like damage."""
    content = path.read_bytes()
    if not PARTIAL.fullmatch(path.name):
        return content
    end = len(content.rstrip(b"\0"))
    return path.read_bytes()[:end].ljust(len(content), b"\0")


def _put_new(archive: Archive, of: str, content: bytes, there: Sequence[str]) -> StoredSegment | None:
    digest = hashlib.sha256(content).hexdigest()
    if digest in there:
        return None
    if there:
        raise VerificationFailed(
            f"{of} has other content in {archive.place.where}",
            "find out which server is the right one, and move the other's WAL away: two servers wrote this segment",
        )
    return archive.put(of, content)


def _put_partial(archive: Archive, listing: ArchiveListing, segment: Segment, system: int, content: bytes) -> bool:
    """Store an unfinished segment under a separate name, then delete the shorter ones."""
    end = written(content)
    whole = content.ljust(segment.bytes, b"\0")
    require_own(whole, segment, system)
    digest = hashlib.sha256(whole).hexdigest()
    old = listing.partials.get(segment.name, ())
    if any(one.sha256 == digest for one in old):
        return False
    new = archive.put(segment.name, whole, end=end, sha256=digest)
    shorter = tuple(one for one in old if one.end <= end)
    listing.partials[segment.name] = (*(one for one in old if one.end > end), new)
    with contextlib.suppress(OpsError):
        archive.remove(shorter)
    return True


def tidy(directory: Path, destinations: Sequence[Destination], keep: int = KEEP_SEGMENTS) -> list[str]:
    """Delete the finished segments of the receiver's directory that every archive has, or has pruned, except the newest
    `keep`."""
    segments = sorted(
        (path for path in _files(directory) if SEGMENT.fullmatch(path.name)),
        key=lambda path: (path.name[8:], path.name[:8]),
    )
    removed = []
    for path in segments[:-keep] if keep else segments:
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            mark = (path.name, found.st_size, found.st_mtime_ns)
            if all(_has(destination, path, mark) for destination in destinations):
                path.unlink()
                removed.append(path.name)
    return removed


def _has(destination: Destination, path: Path, mark: tuple[str, int, int]) -> bool:
    """Query the archive again: a file is not deleted on cached knowledge."""
    if mark not in destination.seen:
        return False
    content = path.read_bytes()
    archive = destination.known(read_header(content, path.name).system)[0]
    there = archive.place.names()
    if path.name <= pruned_in(there).get(path.name[:8], ""):  # deleted there as old
        return True
    digest = hashlib.sha256(content).hexdigest()
    own = [name for name in there if name.startswith(f"{path.name}-{digest}.")]
    return any(name + DAMAGED not in there for name in own if not name.endswith(DAMAGED))


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir(), key=lambda path: (path.name[8:], path.name[:8]))
    except OSError as error:
        raise OpsError(
            f"{directory} cannot be listed: {error.strerror}",
            "correct [wal] directory, start the receiver, or let this user see its directory",
        ) from None


def _system_of(directory: Path) -> int:
    """The cluster of a directory's newest file."""
    for path in reversed(_files(directory)):
        if SEGMENT.fullmatch(path.name) or PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError, VerificationFailed), path.open("rb") as file:
                return read_header(file.read(HEADER.size), path.name).system
    raise VerificationFailed(
        f"{directory} has no segment yet", "nothing to do: its history is shipped with the first segment"
    )


def _tli(path: Path) -> int:
    return int(path.name[:8], 16)
