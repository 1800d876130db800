"""Shipping of the receiver's directory into the archives, file by file: no file is overwritten, and each file's header
is checked first. A file is read, hashed and compressed once for all archives; each archive encrypts it with its own
key."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.files import inside
from tasks.wal.archive.archive import DAMAGED, Archive, ArchiveListing, StoredSegment, pruned_in
from tasks.wal.archive.received import Frames, Mark, ReceivedFile
from tasks.wal.format.header import HEADER, read_header, require_own
from tasks.wal.format.names import HISTORY, PARTIAL, SEGMENT

READERS = 2
LISTINGS = 10
KEEP_SEGMENTS = 64
"""Finished segments that stay in the receiver's directory: a standby may ask for them."""


@dataclass(frozen=True)
class Shipped:
    """One round: the files put into the archive, the refused ones and why, and the newest archived segment. `failure`:
    why the archive was left before the end of the round."""

    put: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    newest: str = ""
    failure: OpsError | None = None


class ArchivedContent(NamedTuple):
    """What was shipped of a file: the cluster (0 for a history) and the SHA-256 of its content."""

    system: int
    sha256: str


@dataclass
class Destination:
    """One archive per cluster, and its known content. `seen`: archived files."""

    name: str
    archive_of: Callable[[int], Archive]
    seen: dict[Mark, ArchivedContent] = field(default_factory=dict)
    _known: dict[int, tuple[Archive, ArchiveListing]] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget the known content: it is listed again."""
        self.seen.clear()
        self._known.clear()

    def has(self, file: ReceivedFile) -> bool:
        """Whether the archive is known to have this file with the content that was read before."""
        if (content := self.seen.get(file.mark)) is None:
            return False
        if file.is_history:
            return True
        try:
            listing, name = self.known(content.system)[1], file.path.name.removesuffix(".partial")
        except OpsError:  # raised again where it is shipped
            return False
        if listing.is_pruned(name) or (file.is_partial and name in listing.segments):
            return True
        stored = (*listing.segments.get(name, ()), *listing.partials.get(name, ()))
        return any(one.sha256 == content.sha256 for one in stored)

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
    done = ship_to_all(directory, [destination], partial=partial)[destination.name]
    if done.failure:
        raise done.failure
    return done


@dataclass
class _Round:
    """The result of one archive."""

    put: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failure: OpsError | None = None


def ship_to_all(
    directory: Path, destinations: Sequence[Destination], *, partial: bool = True, frames: Frames | None = None
) -> Mapping[str, Shipped]:
    """Put every file of a directory into each archive that lacks it, oldest first. An archive that fails is left for
    this round; the others go on. When it returns, they have everything that the directory had when it was called.

    Args:
        frames: the compressed beginning of the unfinished segment, from the last round

    Raises:
        OpsError: the directory cannot be listed, or its files never stay.
    """
    rounds, newest = {destination.name: _Round() for destination in destinations}, ""
    for _ in range(LISTINGS):
        paths = _files(directory)
        newest = max((path.name for path in paths if SEGMENT.fullmatch(path.name)), default="", key=_place)
        wanted = [path for path in paths if SEGMENT.fullmatch(path.name) or HISTORY.fullmatch(path.name)]
        wanted += [path for path in paths if PARTIAL.fullmatch(path.name)] if partial else []
        if _ship_files(directory, [ReceivedFile(path, frames or Frames()) for path in wanted], destinations, rounds):
            break
    else:
        raise OpsError(f"the files of {directory} were renamed or deleted during {LISTINGS} listings", "run it again")
    return {name: Shipped(tuple(done.put), tuple(done.refused), newest, done.failure) for name, done in rounds.items()}


def _place(name: str) -> tuple[str, str]:
    return name[8:], name[:8]


def _ship_files(
    directory: Path, files: Sequence[ReceivedFile], destinations: Sequence[Destination], rounds: Mapping[str, _Round]
) -> bool:
    """Put the files that were listed. False: one was finished and renamed, or deleted, since the listing; what it had
    is in a file of another name."""
    whole = True
    for done in rounds.values():
        done.refused.clear()
    for file in _hashed(files, destinations):
        try:
            for destination in destinations:
                if not rounds[destination.name].failure and not destination.has(file):
                    _ship_file(directory, file, destination, rounds[destination.name])
        except FileNotFoundError:
            whole = False
    return whole


def _hashed(files: Iterable[ReceivedFile], destinations: Sequence[Destination]) -> Iterator[ReceivedFile]:
    """The files in order. Two threads read and hash those that are not known yet, a few files ahead."""

    def read(file: ReceivedFile) -> None:
        with contextlib.suppress(OSError, OpsError):  # raised again where the file is shipped
            _ = file.sha256

    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque[tuple[ReceivedFile, Future[None] | None]]()
        for file in files:
            known = True
            with contextlib.suppress(OSError):
                known = all(destination.has(file) for destination in destinations)
            ahead.append((file, None if known else pool.submit(read, file)))
            if len(ahead) > READERS:
                yield _read(*ahead.popleft())
        while ahead:
            yield _read(*ahead.popleft())


def _read(file: ReceivedFile, reading: Future[None] | None) -> ReceivedFile:
    if reading:
        reading.result()
    return file


def _ship_file(directory: Path, file: ReceivedFile, destination: Destination, done: _Round) -> None:
    try:
        if _ship_one(directory, file, destination):
            done.put.append(file.path.name)
            failpoint("wal: put")
    except VerificationFailed as error:
        done.refused.append(error.message)  # checked again in the next round
    except OpsError as error:
        done.failure = error
    else:
        system = 0 if file.is_history else file.header.system
        destination.seen[file.mark] = ArchivedContent(system, file.sha256)


def _ship_one(directory: Path, file: ReceivedFile, destination: Destination) -> bool:
    """Put one file. Returns whether it was added now.

    Raises:
        VerificationFailed: its content does not match its name, or the archive has other content of that name.
    """
    if file.is_history:
        archive, listing = destination.known(_system_of(directory))
        there = [one.sha256 for one in listing.histories.get(_tli(file.path), ())]
        return _put_new(archive, file.path.name, file, there) is not None
    system, segment = file.header.system, file.segment
    archive, listing = destination.known(system)
    stored = listing.segments.get(segment.name, ())
    there = [one.sha256 for one in stored]
    if not stored and listing.is_pruned(segment.name):
        return False
    if file.is_partial:
        return not there and _put_partial(archive, listing, file)
    require_own(file.content, segment, system)
    if stored and all(one.damaged for one in stored) and file.sha256 not in there:
        there = []  # an intact copy is stored next to a damaged one
    put = _put_new(archive, segment.name, file, there)
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


def _put_new(archive: Archive, of: str, file: ReceivedFile, there: Sequence[str]) -> StoredSegment | None:
    if file.sha256 in there:
        return None
    if there:
        raise VerificationFailed(
            f"{of} has other content in {archive.place.where}",
            "find out which server is the right one, and move the other's WAL away: two servers wrote this segment",
        )
    return archive.put_packed(of, file.sha256, file.packed)


def _put_partial(archive: Archive, listing: ArchiveListing, file: ReceivedFile) -> bool:
    """Store an unfinished segment under a separate name, then delete the shorter ones."""
    segment, end = file.segment, file.end
    require_own(file.content, segment, file.header.system)
    old = listing.partials.get(segment.name, ())
    if any(one.sha256 == file.sha256 for one in old):
        return False
    new = archive.put_packed(segment.name, file.sha256, file.packed, end=end)
    shorter = tuple(one for one in old if one.end <= end)
    listing.partials[segment.name] = (*(one for one in old if one.end > end), new)
    with contextlib.suppress(OpsError):
        archive.remove(shorter)
    return True


def tidy(directory: Path, destinations: Sequence[Destination], keep: int = KEEP_SEGMENTS) -> list[str]:
    """Delete the finished segments of the receiver's directory that every archive has, or has pruned, except the newest
    `keep`. The archives are listed again: no file is deleted on cached knowledge."""
    segments = [path for path in _files(directory) if SEGMENT.fullmatch(path.name)]
    doomed = dict[Path, Mark]()
    for path in segments[:-keep] if keep else segments:
        with contextlib.suppress(FileNotFoundError):
            mark = ReceivedFile(path, Frames()).mark
            if all(mark in destination.seen for destination in destinations):
                doomed[path] = mark
    listed = dict[tuple[str, int], Mapping[str, int]]()
    removed = []
    for path, mark in doomed.items():
        if all(_has(destination, path.name, destination.seen[mark], listed) for destination in destinations):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _has(
    destination: Destination, segment: str, content: ArchivedContent, listed: dict[tuple[str, int], Mapping[str, int]]
) -> bool:
    key = (destination.name, content.system)
    if key not in listed:
        listed[key] = destination.known(content.system)[0].place.names()
    there = listed[key]
    if segment <= pruned_in(there).get(segment[:8], ""):  # deleted there as old
        return True
    own = [name for name in there if name.startswith(f"{segment}-{content.sha256}.")]
    return any(name + DAMAGED not in there for name in own if not name.endswith(DAMAGED))


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir(), key=lambda path: _place(path.name))
    except OSError as error:
        raise OpsError(
            f"{directory} cannot be listed: {error.strerror}",
            "correct [wal] directory, start the receiver, or let this user see its directory",
        ) from None


def _system_of(directory: Path) -> int:
    """The cluster of a directory's newest file."""
    for path in reversed(_files(directory)):
        if SEGMENT.fullmatch(path.name) or PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError, VerificationFailed), inside.reading(path) as file:
                return read_header(file.read(HEADER.size), path.name).system
    raise VerificationFailed(
        f"{directory} has no segment yet", "nothing to do: its history is shipped with the first segment"
    )


def _tli(path: Path) -> int:
    return int(path.name[:8], 16)
