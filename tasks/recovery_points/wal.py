"""The time of a position in WAL: what a copy that ends there would lose.

Commit times are in WAL itself. They are read from the primary's `pg_wal` if that is on this host, and from the
receiver's directory. Only if neither has them, the end of the archive is fetched.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg

from blocks.environment import Environment
from blocks.postgres import nodes
from blocks.postgres.server import Postgres, execute, first_line
from runbook import clock
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.host.disk import is_here
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Chain
from tasks.wal.archive.fetch import fetch
from tasks.wal.format.names import Segment
from tasks.wal.format.pages import Files, next_record, record_behind
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.waldump import Commit, commits_in, must_reach

CATCH_UP_SECONDS = 2.0
LEAST_COMMIT_BYTES = 32
"""A commit record is longer than this, and ends in non-zero bytes."""
BATCH, MOST_AHEAD, MOST_BACK, LOOKS = 2, 64, 16, 3


@dataclass(frozen=True)
class WrittenWal:
    """The primary's write position at the time of the query, and the flush positions of its standbys by name. `end` 0:
    no server takes writes (`problem`). `timeline`: the one that it writes."""

    asked: datetime
    system: int = 0
    end: int = 0
    timeline: int = 0
    streams: Mapping[str, int] | None = None
    problem: str = ""

    def has_streamed(self, name: str) -> bool:
        """Whether that one streams, and has all WAL."""
        return bool(self.end) and (self.streams or {}).get(name, 0) >= self.end


@dataclass(frozen=True)
class Moment:
    """The data is complete up to `at`, exactly or at least. None: unknown."""

    at: datetime | None
    exact: bool


def ask_written(primary: Postgres, names: Sequence[str]) -> WrittenWal:
    """Query the primary. Its standbys of these names get a moment to catch up with that position."""
    asked = clock.now()
    try:
        with primary.connect(seconds=nodes.ASK_SECONDS) as connection:
            execute(connection, "SET statement_timeout = '10s'")
            recovering, system, end, timeline = execute(connection, _WRITTEN)[0]
            if recovering:
                return WrittenWal(asked, int(system), problem="no server takes writes: all answering ones are standbys")
            streams = dict[str, int]()

            def caught_up() -> bool:
                streams.update({str(name): int(place) for name, place in execute(connection, _STREAMS)})
                return all(streams.get(name, int(end)) >= int(end) for name in names)

            with contextlib.suppress(Unreachable):
                until(caught_up, what="the standbys", seconds=CATCH_UP_SECONDS, every_seconds=0.05)
            return WrittenWal(asked, int(system), int(end), int(timeline), streams)
    except psycopg.Error as error:
        return WrittenWal(asked, problem=first_line(error))
    except OpsError as error:
        return WrittenWal(asked, problem=error.message)


_WRITTEN = """
SELECT pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE pg_current_wal_flush_lsn() - '0/0' END,
       CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
"""
_STREAMS = """
SELECT application_name, max(flush_lsn - '0/0'::pg_lsn) FROM pg_stat_replication
WHERE state = 'streaming' AND flush_lsn IS NOT NULL GROUP BY 1
"""


def local_files(directory: Path, system: int) -> list[tuple[Segment, Path]]:
    """The segments of a cluster in a directory of this host, in order, each once: from the newest timeline, without
    what an older one has after the switch (a primary that continued alone). None where it cannot be read."""
    found = dict[int, tuple[Segment, Path]]()
    for one in _find_segments(directory):  # in order of the timelines
        if one.system == system or not system:
            found[one.segment.number] = (one.segment, one.path)
    newest, kept = 0, list[tuple[Segment, Path]]()
    for number in sorted(found):
        if found[number][0].timeline >= newest:
            kept.append(found[number])
            newest = found[number][0].timeline
    return kept


def _find_segments(directory: Path) -> list[Local]:
    """A segment may be finished and renamed during the listing: list again then."""
    for _ in range(LOOKS):
        with contextlib.suppress(OpsError):
            return find_segments(directory)
    return []


def moment_of(
    env: Environment, written: WrittenWal, end: int, chain: Chain | None = None, archive: Archive | None = None
) -> Moment:
    """The time of a copy that ends at `end`: that of the first missing commit; now, if none is missing."""
    if written.end and end + LEAST_COMMIT_BYTES > written.end:
        return Moment(written.asked, True)
    sources = _sources(env, written)
    for files, complete in sources:
        first, whole = _first_after(env.postgres, files, end)
        if first:
            return Moment(first.at, True)
        if whole and complete:
            return Moment(written.asked, True)
    for files, _ in sources:
        if last := _last_before(env.postgres, files, end):
            return Moment(last.at, False)
    return Moment(_last_archived(env, written, chain, archive, end), False)


def _sources(env: Environment, written: WrittenWal) -> list[tuple[Files, bool]]:
    """The available WAL, and whether it is complete: the primary's own is, running or not. If the receiver has a newer
    timeline, another server is the primary, and does not answer either."""
    primary, received = env.postgres, list[tuple[Segment, Path]]()
    if env.has("wal"):
        received = local_files(Path(env.wal.directory), written.system)
        if written.timeline:  # a directory of a branch that was left
            received = [one for one in received if one[0].timeline <= written.timeline]
    found: list[tuple[Files, bool]] = [(received, written.has_streamed(env.wal.name))] if received else []
    if is_here(primary.host):
        own = local_files(Path(primary.data_directory, "pg_wal"), written.system)
        found.insert(0, (own, bool(own) and own[-1][0].timeline >= max(one.timeline for one, _ in received or own)))
    return found


def _first_after(postgres: Postgres, files: Files, end: int) -> tuple[Commit | None, bool]:
    """The first commit that a copy up to `end` lacks; and whether everything after it was read."""
    ahead = [(segment, path) for segment, path in files if segment.end > end]
    if not ahead or ahead[0][0].start > end:
        return None, False
    for index in range(0, min(len(ahead), MOST_AHEAD), BATCH - 1):
        batch = ahead[index : index + BATCH]
        if any(two.number != one.number + 1 for (one, _), (two, _) in itertools.pairwise(batch)):
            return None, False
        commits = _commits(postgres, batch, until=None if batch[-1] == ahead[-1] else batch[-1][0].end)
        if commits is None:
            return None, False
        for commit in commits:
            if commit.lsn + LEAST_COMMIT_BYTES > end:
                return commit, True
    return None, len(ahead) <= MOST_AHEAD


def _last_before(postgres: Postgres, files: Files, end: int) -> Commit | None:
    """The newest commit in a copy up to `end`."""
    behind = [(segment, path) for segment, path in files if segment.start < end]
    if not behind or behind[-1][0].end < end:
        return None
    for last in range(len(behind), max(len(behind) - MOST_BACK, 0), -1):
        batch = behind[max(last - BATCH, 0) : last]
        found = [one for one in _commits(postgres, batch, until=0) or () if one.lsn + LEAST_COMMIT_BYTES <= end]
        if found:
            return found[-1]
    return None


def _commits(postgres: Postgres, files: Files, until: int | None) -> list[Commit] | None:
    """None where they cannot be read: a running server recycles its old files, or the WAL is damaged before `until`
    (None: before its last record)."""
    try:
        if until is not None:
            found = commits_in(postgres, files, must_reach(until))
        else:
            ends = list[int]()
            found = commits_in(postgres, files, ends.append)
            # A running server may have written more since. Then reading again reaches that.
            if behind := ends and record_behind(files, next_record(files, ends[0])):
                found = commits_in(postgres, files, must_reach(behind))
    except OpsError:
        return None
    return found if all(path.exists() for _, path in files) else None


def _last_archived(
    env: Environment, written: WrittenWal, chain: Chain | None, archive: Archive | None, end: int
) -> datetime | None:
    """The newest commit of the archive's last segments, which it fetches."""
    if chain is None or archive is None or not chain.links:
        return None
    links = [link for link in chain.links[-BATCH:] if "/" not in link.stored.name]
    if not links:
        return None
    with tempfile.TemporaryDirectory(prefix="ops-wal-") as directory:
        try:
            found = fetch(archive, written.system, links, Path(directory))
        except OpsError:
            return None
        files = [(link.segment, Path(directory) / link.segment.name) for link in found.links]
        commits = [one for one in _commits(env.postgres, files, until=0) or () if one.lsn + LEAST_COMMIT_BYTES <= end]
    return commits[-1].at if commits else None
