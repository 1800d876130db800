"""All WAL of one cluster that can be read from here, segment by segment: in the archive, the receiver's directory, or a
server's pg_wal. Nothing is changed: segments are copied and read."""

from __future__ import annotations

import functools
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from runbook.errors import OpsError, VerificationFailed
from runbook.files import inside
from runbook.kinds import probe
from tasks.host.disk import is_here
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive, StoredSegment, timeline_in
from tasks.wal.archive.continuity import intact
from tasks.wal.archive.destinations import archive_of
from tasks.wal.format.header import require_own
from tasks.wal.format.names import SEGMENT_BYTES, Segment, Timeline
from tasks.wal.reading.local import find_segments
from tasks.wal.reading.waldump import commits_in

BATCH = 32
RECEIVED = "the receiver's directory"


@dataclass(frozen=True)
class Piece:
    """One segment and its file, on this host or in the archive. `whole`: it is finished."""

    segment: Segment
    where: str
    whole: bool
    path: Path | None = None
    stored: StoredSegment | None = None


@dataclass(frozen=True)
class Supply:
    """The segments of one history by number, oldest first. `silent`: the unreadable places, and why."""

    system: int
    timeline: Timeline
    segment_bytes: int
    archive: Archive | None
    pieces: dict[int, Piece]
    silent: tuple[str, ...]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the available segments, in order."""
        return sorted(self.pieces)

    @property
    def torn(self) -> set[int]:
        """Those with only their beginning, although others follow."""
        return {number for number, piece in self.pieces.items() if not piece.whole} - {max(self.pieces)}

    def missing(self, first: int, last: int) -> list[str]:
        """The names of the missing ones from `first` to `last`."""
        numbers = range(first, last + 1)
        names = {number: Segment(number, self.timeline.number, self.segment_bytes).name for number in numbers}
        ends = {number: f"the rest of {names[number]}" for number in self.torn & set(numbers)}
        return [ends.get(number, names[number]) for number in numbers if number in ends or number not in self.pieces]

    def bring(self, piece: Piece, directory: Path) -> Path:
        """Copy a segment, and check it against its name.

        Raises:
            VerificationFailed: it is damaged, from another cluster, or was deleted meanwhile.
            OpsError, Unreachable: the place does not answer, or the disk is full.
        """
        target = directory / piece.segment.name
        if target.exists():
            return target
        if piece.path:
            try:
                content = inside.read(piece.path)
            except OSError as error:
                raise VerificationFailed(f"{piece.path} cannot be read: {error.strerror}", "run it again") from None
        else:
            assert piece.stored
            assert self.archive
            content = self.archive.get(piece.stored)
        require_own(content, piece.segment, self.system)
        with told(target):
            inside.write(target, content)
        return target


@probe
def read_supply(env: Environment, source: Stores | Literal[""], system: int, timeline: int) -> Supply:
    """Locate every segment of a cluster. Places that do not answer are skipped: the others may have everything.
    `source`: the store with the archive; "": only this host is searched, which is quick.

    Raises:
        OpsError: no place has WAL, or there is no such timeline.
    """
    silent, found, archive, listing = list[str](), list[Piece](), None, None
    if not source:
        silent.append("the archive was not queried")
    elif not env.has(source):
        silent.append(f"[{source}] is not set")
    else:
        try:
            archive = archive_of(env, source, system)
            listing = archive.listing()
        except OpsError as error:
            silent.append(f"the archive: {error.message}")
            archive = None
    for where, directory in directories_of(env):
        try:
            there = find_segments(directory)
        except OpsError as error:
            silent.append(f"{where}: {error.message}")
            continue
        for one in there:
            if one.system == system:
                whole = not one.path.name.endswith(".partial")
                found.append(Piece(one.segment, where, whole, one.path))
    bytes_ = found[0].segment.bytes if found else SEGMENT_BYTES
    if listing:
        for whole, names in ((True, listing.segments), (False, listing.partials)):
            found += [
                Piece(Segment.named(name, bytes_), "the archive", whole, stored=intact(same)[-1])
                for name, same in names.items()
            ]
    if not found:
        hint = "check [wal] directory and [backups] wal of the environment, and the receiver's log"
        raise OpsError("there is no WAL to read" + "".join(f"; {why}" for why in silent), hint)
    history = _history(env, archive, timeline)
    return Supply(system, history, bytes_, archive, _chosen(found, history, bytes_), tuple(silent))


def directories_of(env: Environment) -> list[tuple[str, Path]]:
    """The WAL directories of this host: the receiver's and the servers'."""
    found = [(RECEIVED, Path(env.wal.directory))] if env.has("wal") else []
    nodes = [env.postgres, *([env.standby] if env.has("standby") else [])]  # the primary's goes further
    found += [
        (f"pg_wal of {one.host}:{one.port}", Path(one.data_directory) / "pg_wal") for one in nodes if is_here(one.host)
    ]
    return [(where, path) for where, path in found if path.is_dir()]


def system_here(env: Environment) -> int:
    """The system identifier of the cluster with the newest WAL here; 0 without any."""
    newest, system = (0, 0), 0
    for _, directory in directories_of(env):
        for one in find_segments(directory):
            if (one.timeline, one.start) > newest:
                newest, system = (one.timeline, one.start), one.system
    return system


def _history(env: Environment, archive: Archive | None, number: int) -> Timeline:
    if number == 1:
        return Timeline(1)
    for _, directory in directories_of(env):
        path = directory / f"{number:08X}.history"
        if path.is_file():
            return Timeline.read(number, inside.read_text(path, "replace"))
    if archive is None:
        raise OpsError(
            f"the history of timeline {number} is missing",
            "choose another timeline, or copy the history into the archive",
        )
    return timeline_in(archive, archive.listing(), number)


def _chosen(found: Sequence[Piece], history: Timeline, bytes_: int) -> dict[int, Piece]:
    """The best one of each number: of the newest timeline, finished, and on this host rather than in the archive.

    A server's current segment has the name of a finished one; what follows its last record has no meaning.
    """
    best = dict[int, tuple[int, Piece]]()
    for piece in found:
        candidates = history.candidates(piece.segment.number, bytes_)
        if piece.segment not in candidates:
            continue
        own = piece.where.startswith("pg_wal")
        rank = candidates.index(piece.segment) * 8 + (not piece.whole) * 4 + own * 2 + (piece.path is None)
        if piece.segment.number not in best or rank < best[piece.segment.number][0]:
            best[piece.segment.number] = (rank, piece)
    return {number: best[number][1] for number in sorted(best)}


def first_at(postgres: Postgres, supply: Supply, moment: datetime, directory: Path) -> int:
    """The index, among the supply's numbers, of the first segment with a commit at or after a time; their count without
    one. Commit times are nearly in the order of WAL: a reader starts one segment earlier."""
    numbers = supply.numbers

    @functools.cache
    def newest_in(number: int) -> float:
        piece = supply.pieces[number]
        try:
            path = supply.bring(piece, directory)
        except VerificationFailed:
            return 0.0  # the window's reader reports the problem
        commits = commits_in(postgres, [(piece.segment, path)], lambda _: None)  # nor a damaged place in it
        path.unlink()
        return max((one.at.timestamp() for one in commits), default=0.0)

    def newest(place: int) -> float:
        """The newest commit of the first segment from there on that has one."""
        return next((found for number in numbers[place:] if (found := newest_in(number))), float("inf"))

    return bisect_left(range(len(numbers)), moment.timestamp(), key=newest)


def runs_of(numbers: Sequence[int], torn: Collection[int] = ()) -> Iterator[list[int]]:
    """Consecutive numbers in batches that are read at once. A batch begins with the last segment of the previous one,
    as a record may cross the edge. `torn`: incomplete ones, from which reading cannot continue."""
    batch = list[int]()
    for number in numbers:
        if batch and (number != batch[-1] + 1 or batch[-1] in torn):
            yield batch
            batch = []
        elif len(batch) > BATCH:
            yield batch
            batch = batch[-1:]
        batch.append(number)
    if batch:
        yield batch


def clear(directory: Path, keep: Sequence[str] = ()) -> None:
    """Delete the copied segments except these."""
    for path in directory.iterdir():
        if path.name not in keep:
            path.unlink() if path.is_file() else shutil.rmtree(path)
