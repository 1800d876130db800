"""The transactions in WAL, by pg_waldump. https://www.postgresql.org/docs/current/pgwaldump.html"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import clock, shell
from runbook.errors import CommandFailed
from tasks.wal.format.names import Segment, lsn_of, lsn_text

_COMMIT = re.compile(
    r"tx: +(?P<tx>\d+), lsn: (?P<lsn>[0-9A-F/]+), prev \S+, desc: COMMIT(?:_PREPARED (?P<xid>\d+):)? "
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC"
)
# Its messages at the end of WAL: no more records, or records that are not written yet.
_END = re.compile(
    r"(?:error in WAL record at|could not find a valid record after) ([0-9A-F]+/[0-9A-F]+)"
    r"|could not find file|could not read"
)


@dataclass(frozen=True)
class Commit:
    """A committed transaction: its ID (without epoch), the beginning of its commit record, and the server's commit
    time. Commit times are not in the order of the records."""

    xid: int
    lsn: int
    at: datetime

    @property
    def text(self) -> str:
        """The transaction with its time and place."""
        return f"transaction {self.xid}, committed {clock.text(self.at, 'microseconds')}, at {lsn_text(self.lsn)}"


def commits_in(
    postgres: Postgres,
    files: Sequence[tuple[Segment, Path]],
    stopped: Callable[[int], None] = lambda _: None,
    start: int = 0,
) -> list[Commit]:
    """Every commit in consecutive segments of one history, in the order of WAL. `stopped`, `start`: see `lines_in`.

    Raises:
        CommandFailed: pg_waldump failed, other than at the end of WAL.
    """
    lines = lines_in(postgres, files, ["Transaction"], stopped, start)
    return [commit for line in lines if (commit := _commit(line))]


def lines_in(
    postgres: Postgres,
    files: Sequence[tuple[Segment, Path]],
    managers: Sequence[str],
    stopped: Callable[[int], None] = lambda _: None,
    start: int = 0,
) -> Iterator[str]:
    """The output of pg_waldump for some resource managers in consecutive segments of one history, from the first record
    at or after `start` on (0: from their beginning). `stopped` gets the LSN at which reading ended early.

    Raises:
        CommandFailed: it failed, other than at the end of WAL.
    """
    if not files:
        return
    one = files[-1][0].timeline
    with tempfile.TemporaryDirectory(prefix="ops-wal-") as directory:
        for segment, path in files:  # named as one timeline's: pg_waldump reads only one
            (Path(directory) / Segment(segment.number, one, segment.bytes).name).symlink_to(path)
        # At the beginning of a segment it finds the first record that begins there.
        argv = [
            *(postgres.program("pg_waldump"), f"--path={directory}", f"--timeline={one}"),
            *(f"--rmgr={manager}" for manager in managers),
            f"--start={lsn_text(max(start, files[0][0].start))}",
            f"--end={lsn_text(files[-1][0].end)}",  # otherwise it waits 5 s for the next one
        ]
        yield from _printed(argv, stopped)


def _printed(argv: Sequence[str], stopped: Callable[[int], None]) -> Iterator[str]:
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
            if not (end := _END.search(said := err.read().decode(errors="replace"))):
                raise CommandFailed(argv, code, said, "check the segments that it names")
            if end[1]:
                stopped(lsn_of(end[1]))


def _commit(line: str) -> Commit | None:
    if not (match := _COMMIT.search(line)):
        return None
    at = datetime.fromisoformat(match["at"]).replace(tzinfo=UTC)
    return Commit(int(match["xid"] or match["tx"]), lsn_of(match["lsn"]), at)
