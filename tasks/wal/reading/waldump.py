"""The transactions in WAL, by pg_waldump. https://www.postgresql.org/docs/current/pgwaldump.html"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import clock, shell
from runbook.errors import CommandFailed, VerificationFailed
from tasks.wal.format.names import Segment, lsn_of, lsn_text
from tasks.wal.format.pages import Files, next_record, record_behind

_COMMIT = re.compile(
    r"tx: +(?P<tx>\d+), lsn: (?P<lsn>[0-9A-F/]+), prev \S+, desc: COMMIT(?:_PREPARED (?P<xid>\d+):)? "
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC(?P<rest>.*)"
)
# A database has statistics of kind 1: the transaction that drops it drops them too.
_DROPPED = re.compile(r"; dropped stats:(?: \d+/\d+/\d+)*? 1/(\d+)/0\b")
_PREPARED = re.compile(
    r"tx: +(?P<tx>\d+), lsn: (?P<lsn>[0-9A-F/]+), prev \S+, desc: "
    r"(?:PREPARE gid (?P<gid>.*?): \d{4}-\d\d-\d\d |(?:COMMIT|ABORT)_PREPARED (?P<ended>\d+):)"
)
MAXIMUM = 1 << 63
"""An LSN after every other one."""
LSN = re.compile(r"lsn: ([0-9A-F]+/[0-9A-F]+),")
# Where it stops reading: at the last record that it could read, or at the position from which on it found none.
_STOPPED = re.compile(r"(?:error in WAL record at|could not find a valid record after) ([0-9A-F]+/[0-9A-F]+)")
_NO_FILE = re.compile(r'could not find file "([0-9A-F]{24})"')


@dataclass(frozen=True)
class Commit:
    """A committed transaction: its ID (without epoch), the beginning of its commit record, and the server's commit
    time. Commit times are not in the order of the records. `dropped`: the OID of the database that it dropped, or 0."""

    xid: int
    lsn: int
    at: datetime
    dropped: int = 0

    @property
    def text(self) -> str:
        """The transaction with its time and place."""
        return f"transaction {self.xid}, committed {clock.text(self.at, 'microseconds')}, at {lsn_text(self.lsn)}"


@dataclass
class PreparedTransactions:
    """The transactions that were prepared for a two-phase commit: the LSN and the name (GID) of each by its ID, and the
    LSN at which it was committed or rolled back."""

    begun: dict[int, tuple[int, str]] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)

    def watch(self, lines: Iterable[str]) -> Iterator[str]:
        """Pass the output of pg_waldump for `Transaction` on, and read it."""
        for line in lines:
            if match := _PREPARED.search(line):
                if match["ended"]:
                    self.ended[int(match["ended"])] = lsn_of(match["lsn"])
                else:
                    self.begun[int(match["tx"])] = (lsn_of(match["lsn"]), match["gid"])
            yield line

    def left_at(self, lsn: int) -> list[str]:
        """The names of those that are prepared where recovery stops before the record at `lsn`."""
        found = ((xid, gid) for xid, (at, gid) in self.begun.items() if at < lsn)
        return sorted(gid for xid, gid in found if self.ended.get(xid, lsn) >= lsn)


def commits_in(
    postgres: Postgres,
    files: Files,
    stopped: Callable[[int], None] | None = None,
    jump: int = 0,
    prepared: PreparedTransactions | None = None,
) -> list[Commit]:
    """Every commit in consecutive segments of one history, in the order of WAL. See `lines_in`. `prepared` gets the
    prepared transactions.

    Raises:
        VerificationFailed: reading ended early, and there is no `stopped`.
        CommandFailed: pg_waldump failed otherwise.
    """
    lines = lines_in(postgres, files, ["Transaction"], stopped=stopped, jump=jump)
    return [commit for line in (prepared.watch(lines) if prepared else lines) if (commit := _commit(line))]


def lines_in(
    postgres: Postgres,
    files: Files,
    managers: Sequence[str],
    *,
    stopped: Callable[[int], None] | None = None,
    start: int = 0,
    jump: int = 0,
    only: Sequence[str] = (),
) -> Iterator[str]:
    """The output of pg_waldump for some resource managers in consecutive segments of one history, for the records at or
    after `start` (0: all of them).

    It reads from the beginning of a segment. Elsewhere it may find no record although others follow: behind a switch of
    segments there are zeros only. `jump` begins in the middle nevertheless: everything before it is damaged.

    Reading must reach the end of the last segment, into which the last record may continue. Where WAL may end earlier,
    `stopped` gets the LSN of the last record that was read, or of the position from which on none was found.

    Args:
        only: more options that choose records

    Raises:
        VerificationFailed: reading ended early, and there is no `stopped`.
        CommandFailed: pg_waldump failed otherwise.
    """
    files = [one for one in files if one[0].end > max(start, jump)]
    if not files:
        return
    one = files[-1][0].timeline
    with tempfile.TemporaryDirectory(prefix="ops-wal-") as directory:
        for segment, path in files:  # named as one timeline's: pg_waldump reads only one
            (Path(directory) / Segment(segment.number, one, segment.bytes).name).symlink_to(path)
        argv = [
            *(postgres.program("pg_waldump"), f"--path={directory}", f"--timeline={one}"),
            *(f"--rmgr={manager}" for manager in managers),
            *only,
            f"--start={lsn_text(jump or files[0][0].start)}",
            f"--end={lsn_text(files[-1][0].end)}",  # otherwise it waits 5 s for the next one
        ]
        lines = _printed(argv, files[-1][0], stopped)
        yield from _from(start, lines) if start > files[0][0].start else lines


def _from(start: int, lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if (match := LSN.search(line)) and lsn_of(match[1]) >= start:
            yield line
            yield from lines


def _printed(argv: Sequence[str], last: Segment, stopped: Callable[[int], None] | None) -> Iterator[str]:
    environment = {"TZ": "UTC", "LC_ALL": "C"}
    with (
        tempfile.TemporaryFile() as err,
        shell.spawn(argv, environment=environment, stdout=subprocess.PIPE, stderr=err) as child,
    ):
        assert child.stdout
        for line in child.stdout:
            yield line.decode(errors="replace")
        if code := child.wait():
            err.seek(0)
            said = err.read().decode(errors="replace")
            if (missing := _NO_FILE.search(said)) and missing[1] > last.name:
                return  # the last record continues in the next segment
            if not (end := _STOPPED.search(said)):
                raise CommandFailed(argv, code, said, "check the segments that it names")
            (stopped or must_reach(last.end))(lsn_of(end[1]))


def must_reach(lsn: int) -> Callable[[int], None]:
    """A `stopped` for WAL whose record at `lsn` must be read: it raises VerificationFailed where reading ended before
    that."""

    def stopped(last: int) -> None:
        if last < lsn:
            raise VerificationFailed(
                f"the WAL does not decode after {lsn_text(last)}, although it continues to {lsn_text(lsn)} at least",
                "find an intact copy of that segment: in the replica store (source=copies), the receiver's directory "
                "or a server's pg_wal",
            )

    return stopped


def at_the_end(files: Files, until: int = MAXIMUM) -> Callable[[int], None]:
    """A `stopped` for the newest WAL that there is: it raises VerificationFailed where records follow the place at
    which reading ended, if that is before `until`."""

    def stopped(last: int) -> None:
        reached = next_record(files, last)
        if reached < until and (behind := record_behind(files, reached)):
            must_reach(behind)(last)

    return stopped


def _commit(line: str) -> Commit | None:
    if not (match := _COMMIT.search(line)):
        return None
    at = datetime.fromisoformat(match["at"]).replace(tzinfo=UTC)
    dropped = _DROPPED.search(match["rest"])
    return Commit(int(match["xid"] or match["tx"]), lsn_of(match["lsn"]), at, int(dropped[1]) if dropped else 0)
