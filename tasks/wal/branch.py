"""The timeline in use: the history that acknowledged last. After the undo of a cluster's swap that is the lower one.

A server that takes writes is asked. Without an answer, its data directory and the archive's newest record of a
promotion, a swap or an undo decide; where these leave several timelines, the newest commit.

https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from blocks.postgres import nodes
from runbook.errors import CommandFailed, OpsError, TimelineUnknown, VerificationFailed
from runbook.files import inside
from runbook.kinds import action
from tasks.wal.archive.archive import Archive, ArchiveListing, BranchMark, timeline_in
from tasks.wal.archive.continuity import intact
from tasks.wal.archive.destinations import archive_of
from tasks.wal.format.names import SEGMENT_BYTES, Segment, Timeline
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.supply import directories_of
from tasks.wal.reading.waldump import commits_in

MOST_SEGMENTS = 16
"""How far back the newest commit of a timeline is searched."""
NEVER = datetime.min.replace(tzinfo=UTC)


def timeline_in_use(
    env: Environment, archive: Archive, listing: ArchiveListing, system: int, number: int = 0, *, of: str = ""
) -> Timeline:
    """Return the history of the timeline in use, or of `number`. `of`: the environment whose archive it is, if it is
    another one: its servers are not asked.

    Raises:
        TimelineUnknown: several may be in use.
        OpsError: there is no such timeline, or no history of it.
        VerificationFailed: its history is damaged, or there are two.
    """
    branches = Branches.found(env, archive, listing, system, of)
    return branches.history(number or branches.in_use())


def number_in_use(env: Environment, which: Stores, system: int) -> int:
    """Return the number of the timeline in use, also where the archive cannot be listed. 1 without any WAL.

    Raises:
        TimelineUnknown: several may be in use.
    """
    return _branches(env, which, system).in_use()


def read_history(env: Environment, which: Stores, system: int, number: int) -> Timeline:
    """Return a timeline with its ancestors, also where the archive cannot be listed.

    Raises:
        OpsError: no place has it.
    """
    return _branches(env, which, system).history(number)


def _branches(env: Environment, which: Stores, system: int) -> Branches:
    archive, listing = None, ArchiveListing({}, {}, {})
    with contextlib.suppress(OpsError):  # whoever reads its WAL reports that
        archive = archive_of(env, which, system)
        listing = archive.listing()
    return Branches.found(env, archive, listing, system)


@action(idempotent=True)
def record_in_use(env: Environment, system: int, timeline: int, left: Sequence[int] = ()) -> str:
    """Record in each archive that this timeline takes the writes from now on, and that those in `left` do not. A
    recovery on another host finds it there. Returns why one could not be written, or "". pgBackRest's repository takes
    no record.
    """
    problems = []
    for which in get_args(Stores):
        if env.has(which) and not (which == "backups" and env.has("wal") and env.wal.tool == "pgbackrest"):
            try:
                archive_of(env, which, system).note_in_use(timeline, left)
            except OpsError as error:
                problems.append(f"[{which}]: {error.message}")
    return "; ".join(problems)


@dataclass(frozen=True)
class Branches:
    """The timelines of one cluster. `here`: the WAL on this host, by timeline; `live`: the timeline of the server that
    takes writes, or 0; `directories`: those of the data directories of stopped primaries on this host."""

    env: Environment
    archive: Archive | None
    listing: ArchiveListing
    system: int
    here: Mapping[int, Sequence[Local]]
    live: int = 0
    directories: frozenset[int] = frozenset()

    @classmethod
    def found(
        cls, env: Environment, archive: Archive | None, listing: ArchiveListing, system: int, of: str = ""
    ) -> Branches:
        """Ask the server, and list the WAL of this host."""
        if of not in ("", env.name):
            return cls(env, archive, listing, system, {})
        here = defaultdict[int, list[Local]](list)
        for _, directory in directories_of(env):
            with contextlib.suppress(OpsError):  # not readable for this user
                for one in find_segments(directory):
                    if one.system == system:
                        here[one.timeline].append(one)
        state = nodes.ask(env.postgres)
        if state and state.system == system and not state.in_recovery:
            return cls(env, archive, listing, system, here, state.timeline)
        return cls(env, archive, listing, system, here, 0, frozenset(_of_primaries(env, system)))

    def in_use(self) -> int:
        """Return the number of the timeline in use; 1 without any.

        Raises:
            TimelineUnknown: several may be in use.
        """
        if self.live:
            return self.live
        archived, mark = self.listing.timelines, self.listing.branch
        known = archived | self.here.keys()
        candidates = {one for one in known if not mark or self._continues(one, mark)}
        candidates |= {mark.timeline} if mark else set()
        # A copy that was swapped in, but not started yet, has acknowledged nothing that the archive lacks.
        candidates |= {one for one in self.directories if one in archived or not archived}
        return self._newest(candidates) if candidates else 1

    def history(self, number: int) -> Timeline:
        """Return a timeline with its ancestors: from the archive, or where it was not archived yet, from this host.

        Raises:
            OpsError: it is in neither.
            VerificationFailed: it is damaged, or there are two.
        """
        if number > 1 and number not in self.listing.histories and self.here:
            for _, directory in directories_of(self.env):
                if (path := directory / f"{number:08X}.history").is_file():
                    return Timeline.read(number, inside.read_text(path, "replace"))
        if self.archive:
            return timeline_in(self.archive, self.listing, number)
        return Timeline(number)

    def _continues(self, timeline: int, mark: BranchMark) -> bool:
        """Return True if it began after the record, from the recorded timeline, and not by way of one that was left."""
        line = [*(number for number, _ in self._ancestors(timeline)), timeline]
        return mark.timeline in line and all(one > mark.highest for one in line[line.index(mark.timeline) + 1 :])

    def _left_at(self, timeline: int, ancestor: int) -> int:
        """Where `timeline` left its ancestor; 0 where that is none, or the history is missing or damaged."""
        if timeline == ancestor:
            return 0
        with contextlib.suppress(OpsError):
            return self.history(timeline).left_at(ancestor) or 0
        return 0

    def _newest(self, candidates: Iterable[int]) -> int:
        """The one with the newest commit that the others lack. Without such commits: the youngest of one line."""
        numbers = sorted(candidates)
        if len(numbers) == 1:
            return numbers[0]

        def newest_own(number: int) -> datetime:
            left = [place for other in numbers if (place := self._left_at(other, number))]
            parents = self._ancestors(number)
            return self._newest_commit(number, max([*left, *(place for _, place in parents[-1:])], default=0)) or NEVER

        times = {number: newest_own(number) for number in numbers}
        best = max(numbers, key=lambda number: (times[number], number))
        unsure = [one for one in numbers if one != best and times[best] is NEVER and not self._left_at(best, one)]
        if unsure:
            raise TimelineUnknown(
                f"it is unknown which timeline is in use: {best} or {', '.join(map(str, unsure))}",
                "find out which one the application wrote to last, then run this again with its timeline=…",
            )
        return best

    def _ancestors(self, number: int) -> tuple[tuple[int, int], ...]:
        with contextlib.suppress(OpsError):
            return self.history(number).ancestors
        return ()

    def _newest_commit(self, number: int, since: int) -> datetime | None:
        """The time of the newest commit on a timeline at or after an LSN."""
        here = {one.segment.number: one for one in self.here.get(number, ())}
        bytes_ = next((one.bytes for found in self.here.values() for one in found), SEGMENT_BYTES)
        archived = {
            Segment.named(name, bytes_).number: name
            for name in (*self.listing.partials, *self.listing.segments)
            if int(name[:8], 16) == number
        }
        numbers = [one for one in sorted({*here, *archived}) if (one + 1) * bytes_ > since]
        with tempfile.TemporaryDirectory(prefix="ops-wal-") as scratch:
            for one in numbers[: -MOST_SEGMENTS - 1 : -1]:
                segment = Segment(one, number, bytes_)
                path = here[one].path if one in here else self._fetched(archived[one], Path(scratch))
                if path is None:
                    continue
                # Its last record may continue in the next segment; it may be damaged, or recycled meanwhile.
                with contextlib.suppress(CommandFailed):
                    found = commits_in(self.env.postgres, [(segment, path)], lambda _: None)
                    if times := [commit.at for commit in found if commit.lsn >= since]:
                        return max(times)
        return None

    def _fetched(self, name: str, directory: Path) -> Path | None:
        """A segment from the archive; None where it is damaged."""
        assert self.archive
        stored = intact(self.listing.segments.get(name, ())) or self.listing.partials[name]
        path = directory / name
        try:
            inside.write(path, self.archive.get(stored[-1]))
        except VerificationFailed:
            return None
        return path


def _of_primaries(env: Environment, system: int) -> set[int]:
    """The timelines of the data directories on this host that are no standby's."""
    found = set()
    for node in env.nodes():
        if nodes.files_of(node) == "primary":
            with contextlib.suppress(OpsError):  # not readable for this user
                found.add(timeline_of(Path(node.data_directory), system))
    return found - {0}


def timeline_of(data: Path, system: int) -> int:
    """Return the timeline that a server's data directory writes, by its WAL; 0 without WAL of that cluster. Histories
    of other branches may lie there too.

    Raises:
        OpsError: it cannot be read.
    """
    return max((one.timeline for one in find_segments(data / "pg_wal") if one.system == system), default=0)
