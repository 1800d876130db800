"""The WAL in a directory of segments beyond a position, up to the last complete record.

https://www.postgresql.org/docs/current/pgwaldump.html
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.files import inside
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.format.pages import record_behind, record_end
from tasks.wal.reading.committed import Committed, read_committed
from tasks.wal.reading.local import Local, find_segments
from tasks.wal.reading.waldump import lines_in

WALDUMP_SECONDS = 300
_END = re.compile(r"error in WAL record at ([0-9A-F]+/[0-9A-F]+)")
_RECORD = re.compile(r"len \(rec/tot\): +\d+/ *(\d+), tx: +\d+, lsn: ([0-9A-F]+/[0-9A-F]+), prev \S+, desc: (\w+)")
_TAIL_BYTES = 1 << 20
_COMMITS = re.compile(r"^\s*Transaction/COMMIT\w*\s+(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Beyond:
    """Complete records after a position: the end of the last one (the position itself without any), their bytes, and
    the transactions that they commit."""

    end: int
    bytes: int = 0
    commits: int = 0


def read_beyond(postgres: Postgres, directory: Path, timeline: int, place: int) -> Beyond:
    """Read what a directory has of a timeline after a position.

    Raises:
        OpsError: it cannot be read, or it has a gap before later WAL.
    """
    beyond = _read_beyond(postgres, directory, timeline, place)
    while _goes_on(directory, timeline, beyond.end):
        again = _read_beyond(postgres, directory, timeline, place)
        if again.end == beyond.end:
            raise OpsError(
                f"{directory} is damaged: nothing is readable from {lsn_text(beyond.end)} on, although later WAL "
                "exists",
                "copy an intact segment there (from the archive or another server's pg_wal), then run it again",
            )
        beyond = again  # more was written meanwhile
    return beyond


def read_commits(postgres: Postgres, directory: Path, timeline: int, place: int) -> tuple[list[Committed], int]:
    """Read the commits that a directory has of a timeline after a position, and the end of its last complete record.

    Raises:
        OpsError: it cannot be read, or lacks the WAL at that position.
    """
    there = [one for one in find_segments(directory) if one.timeline == timeline and one.start + one.bytes >= place]
    if not there or there[0].start > place:
        raise OpsError(f"{directory} lacks the WAL at {lsn_text(place)} of timeline {timeline}")
    end = read_beyond(postgres, directory, timeline, place).end
    files = [(one.segment, one.path) for one in there]
    return read_committed(postgres, files, place - 1, end) if end > place else [], end


def ends_in_shutdown(postgres: Postgres, directory: Path, timeline: int, end: int) -> bool:
    """Whether the record that ends at `end` is the checkpoint of a clean shutdown, by the WAL in a directory.

    Raises:
        OpsError: it cannot be read.
    """
    there = [one for one in find_segments(directory) if one.timeline == timeline and one.start < end]
    if not there:
        return False
    files = [(one.segment, one.path) for one in there[-2:]]  # the record may cross the edge
    bytes_ = there[-1].bytes
    lines = lines_in(postgres, files, ["XLOG"], stopped=lambda _: None)
    records = (_RECORD.search(line) for line in lines if "CHECKPOINT_SHUTDOWN" in line)
    return any(record_end(lsn_of(one[2]), int(one[1]), bytes_) == end for one in records if one)


def _goes_on(directory: Path, timeline: int, end: int) -> bool:
    """Whether a later segment than the last readable one has records: a server flushes a segment before it writes the
    next. (Within one segment, a power failure may leave the end without the middle.) A file that is renamed meanwhile
    is skipped."""
    with contextlib.suppress(FileNotFoundError):
        there = [one for one in find_segments(directory) if one.timeline == timeline and one.start > end]
        return bool(record_behind([(one.segment, one.path) for one in there], end))
    return False


def _read_beyond(postgres: Postgres, directory: Path, timeline: int, place: int) -> Beyond:
    there = [one for one in find_segments(directory) if one.timeline == timeline and one.start + one.bytes > place]
    if not there:
        return Beyond(place)
    if there[0].start > place:
        raise OpsError(
            f"{directory} begins at {lsn_text(there[0].start)}: WAL from {lsn_text(place)} up to there is missing",
            "copy the missing segments there from the archive, then run it again",
        )
    with _linked(there) as links:
        argv: list[str | Path] = [postgres.program("pg_waldump"), "-p", links, "-t", str(timeline)]
        end = _end(argv, place, there[0].bytes)
        if end == place:
            return Beyond(place)
        span = ["-s", lsn_text(place), "-e", lsn_text(end)]
        counted = shell.run([*argv, *span, "--stats=record"], timeout_seconds=WALDUMP_SECONDS).stdout
    return Beyond(end, end - place, sum(map(int, _COMMITS.findall(counted))))


def _end(argv: list[str | Path], place: int, segment_bytes: int) -> int:
    """The end of the last complete record by pg_waldump; `place` without one."""
    try:
        shell.run([*argv, "-s", lsn_text(place), "-q"], environment={"LC_ALL": "C"}, timeout_seconds=WALDUMP_SECONDS)
    except CommandFailed as error:
        if "could not find a valid record" in error.stderr:
            return place
        if found := _END.search(error.stderr):
            return max(place, _last_end([*argv, "-s", found[1], "-n", "1"], segment_bytes))
        if "could not find file" in error.stderr:  # the next segment: the last record continues in it, or it is unused
            return max(place, _last_end([*argv, "-s", lsn_text(place)], segment_bytes))
        raise
    raise OpsError("pg_waldump found no end of the WAL", "check the WAL directory with pg_waldump")


def _last_end(argv: list[str | Path], segment_bytes: int) -> int:
    """The end of the last printed record; 0 without one."""
    with tempfile.TemporaryFile() as out:
        with shell.spawn(argv, environment={"LC_ALL": "C"}, stdout=out) as child:
            child.wait(WALDUMP_SECONDS)
        out.seek(max(0, out.tell() - _TAIL_BYTES))
        found = _RECORD.findall(out.read().decode(errors="replace"))
    if not found:
        return 0
    bytes_, start, what = found[-1]
    end = record_end(lsn_of(start), int(bytes_), segment_bytes)
    return -(-end // segment_bytes) * segment_bytes if what == "SWITCH" else end


@contextlib.contextmanager
def _linked(segments: list[Local]) -> Iterator[Path]:
    """A directory of links in which a `.partial` segment has a complete one's name, as pg_waldump requires.

    The links lead to open files: a recovering server replaces the segments meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="ops-wal-") as directory, contextlib.ExitStack() as stack:
        for one in segments:
            try:
                file = stack.enter_context(inside.reading(one.path))
            except OSError as error:
                raise OpsError(f"{one.path} cannot be read: {error.strerror}", "run it again") from None
            Path(directory, one.name).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        yield Path(directory)
