"""The receiver's directory into the archive, file by file: nothing that is there is written over, and what a file
claims to be is checked before it is put anywhere."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from tasks.wal.archive.archive import DAMAGED, Archive, Listing, Stored, pruned_in, written
from tasks.wal.format.header import HEADER, read_header, require_own
from tasks.wal.format.names import HISTORY, PARTIAL, SEGMENT, Segment

KEEP_SEGMENTS = 64
"""Finished segments that stay in the receiver's directory: a standby may ask for them."""


@dataclass(frozen=True)
class Shipped:
    """One round: what was put into the archive, what was refused and why, and the newest segment that is there."""

    put: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    newest: str = ""


@dataclass
class Destination:
    """One archive for each cluster whose WAL comes, and what is known to be in it. `seen` are files that are there."""

    name: str
    archive_of: Callable[[int], Archive]
    seen: set[tuple[str, int, int]] = field(default_factory=set)
    _known: dict[int, tuple[Archive, Listing]] = field(default_factory=dict)

    def forget(self) -> None:
        """Ask the archive again what it has."""
        self.seen.clear()
        self._known.clear()

    def known(self, system: int) -> tuple[Archive, Listing]:
        """A cluster's archive and what it held when it was first asked, and was given since."""
        if system not in self._known:
            archive = self.archive_of(system)
            self._known[system] = (archive, archive.listing())
        return self._known[system]


def ship(directory: Path, destination: Destination, *, partial: bool = True) -> Shipped:
    """Put everything that is in a directory and not yet in the archive there, oldest first.

    Raises:
        OpsError, Unreachable: directory or archive do not answer; launched again, it goes on.
    """
    put, refused = list[str](), list[str]()
    files = _files(directory)
    wanted = [path for path in files if SEGMENT.fullmatch(path.name) or HISTORY.fullmatch(path.name)]
    wanted += [path for path in files if PARTIAL.fullmatch(path.name)] if partial else []
    for path in wanted:
        with contextlib.suppress(FileNotFoundError):  # finished and renamed, or removed, since it was listed
            found = path.stat()
            mark = (path.name, found.st_size, found.st_mtime_ns)
            if mark in destination.seen:
                continue
            try:
                if _ship_one(directory, path, destination):
                    put.append(path.name)
                    failpoint("wal: put")
            except VerificationFailed as error:
                refused.append(error.message)  # looked at again: somebody may put it right
            else:
                destination.seen.add(mark)
    segments = [path.name for path in files if SEGMENT.fullmatch(path.name)]
    return Shipped(tuple(put), tuple(refused), max(segments, default="", key=lambda name: (name[8:], name[:8])))


def _ship_one(directory: Path, path: Path, destination: Destination) -> bool:
    """Whether it was put there now.

    Raises:
        VerificationFailed: it is not what its name says, or the archive has something else of that name.
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
        there = []  # an intact copy goes beside what is marked as damaged
    put = _put_new(archive, segment.name, content, there)
    if put is None:
        return False
    is_late = any(name[8:] >= segment.name[8:] for name in listing.segments)
    listing.segments[segment.name] = (*stored, put)
    old = listing.partials.pop(segment.name, ())
    with contextlib.suppress(OpsError):  # an object lock holds them: they do no harm
        archive.remove(old)
    if is_late and archive.listing().is_pruned(segment.name):  # a prune marked it after the listing was read
        with contextlib.suppress(OpsError):
            archive.remove([put])
        return False
    return True


def _read(path: Path) -> bytes:
    """A file's content. Of one that is being written, what was there before its second reading began: a page that is
    read before it is written, followed by one that is read after it was, would look like damage."""
    content = path.read_bytes()
    if not PARTIAL.fullmatch(path.name):
        return content
    end = len(content.rstrip(b"\0"))
    return path.read_bytes()[:end].ljust(len(content), b"\0")


def _put_new(archive: Archive, of: str, content: bytes, there: Sequence[str]) -> Stored | None:
    digest = hashlib.sha256(content).hexdigest()
    if digest in there:
        return None
    if there:
        raise VerificationFailed(
            f"{of} is in {archive.place.where} with another content",
            "two servers wrote it: find out which one is to go on, and move the other's WAL away",
        )
    return archive.put(of, content)


def _put_partial(archive: Archive, listing: Listing, segment: Segment, system: int, content: bytes) -> bool:
    """What is written so far, under a name of its own; those that it goes beyond are taken away afterwards."""
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
    """Remove finished segments from the receiver's directory that every archive has, or has pruned, but for the newest
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
    """Asked anew of the archive: a file is removed on nobody's memory."""
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
    """Whose WAL a directory holds: its newest file's cluster."""
    for path in reversed(_files(directory)):
        if SEGMENT.fullmatch(path.name) or PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError, VerificationFailed), path.open("rb") as file:
                return read_header(file.read(HEADER.size), path.name).system
    raise VerificationFailed(f"{directory} holds no segment yet", "its history goes with the first segment")


def _tli(path: Path) -> int:
    return int(path.name[:8], 16)
