"""The gate before a database, or some of its tables, are replaced on a running server.

The replacing transaction calls `DatabaseGate.judge` when nobody can write there: no session is left and none can log
in, or the tables are locked. It reads the WAL to its end, counts the commits that the copy lacks, and raises where that
is more than the plan said: the transaction rolls back. A plan counts in the same way, without the fence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from blocks.environment import Environment, Stores
from blocks.postgres.server import execute
from flows.loss import loss_of, planned_loss_of, require_confirmed
from runbook import clock
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.units import size
from runbook.wait import until
from tasks.backups.catalogue import Backup
from tasks.postgres.restore.staged_copy import content_in
from tasks.postgres.restore.superseded import read_named
from tasks.stores.directory import told
from tasks.wal.format.names import Segment, lsn_of, lsn_text
from tasks.wal.reading.committed import CommitReader, Committed
from tasks.wal.reading.supply import Supply, read_supply, runs_of
from tasks.wal.reading.transactions import Pair

MOST_BYTES, MOST_BYTES_FENCED, MOST_COMMITS = 1 << 30, 64 << 20, 1_000_000
"""The most WAL that is read at once only to count what is known to be lost, the most while clients wait, and the most
commits that are remembered (600 bytes each). Measured: 46 MB/s of bulk inserts, 200,000 records of WAL a second."""

RECEIVED_SECONDS = 10.0
"""How long to wait for a receiver to have all WAL of a server on another host, where a count is needed."""


@dataclass(frozen=True)
class DatabaseCopy:
    """A copy that may replace a database, or some of its tables.

    It has every commit whose record begins at or before the LSN `end`, of the cluster `system` on `timeline` (0: not
    known); with a `snapshot` (pg_current_snapshot at about that LSN), those that it includes. `without`: transactions
    that it leaves out on purpose. `databases`: the OIDs of what it replaces. `since`: the time of the copy; every later
    write is lost, also where nobody can count them. `named`: the LSN at which a restore gave the live database its name
    (0: not known)."""

    part: str
    end: int
    system: int
    databases: Collection[int]
    timeline: int = 0
    snapshot: str = ""
    without: Collection[int] = ()
    since: datetime | None = None
    named: int = 0

    def lacks(self, one: Committed) -> bool:
        """Whether a commit is missing in it."""
        if one.xid in self.without:
            return False
        return one.lsn > self.end if not self.snapshot else not _includes(self.snapshot, one.xid)


def _includes(snapshot: str, xid: int) -> bool:
    """Whether a committed transaction is visible in a snapshot (`xmin:xmax:xip,…`, with epochs; `xid` has none)."""
    running = snapshot.split(":")[2]
    return _began_before(snapshot, xid) and xid not in {int(one) % (1 << 32) for one in running.split(",") if one}


def _began_before(snapshot: str, xid: int) -> bool:
    """Whether a transaction had its ID when a snapshot was taken."""
    return (int(snapshot.split(":")[1]) - xid - 1) % (1 << 32) < 1 << 31


@dataclass
class DatabaseGate:
    """The gate of one database, or of some of its tables, on a running server.

    `find_files`: the files of these tables; by default the whole database is counted. `otherwise`: the loss where
    commits cannot be counted, from the reason; by default all since the copy, or unknown. `loss`: what it measured."""

    report: Report
    env: Environment
    copy: DatabaseCopy
    find_files: Callable[[], Collection[Pair]] | None = None
    otherwise: Callable[[str], Loss] | None = None
    loss: Loss | None = None
    _reader: CommitReader = field(default_factory=CommitReader)
    _why_uncounted: str = ""
    _began: str = ""  # a snapshot: the records of all later transactions are read

    def plan(self) -> Loss:
        """The loss as of now, for the plan: clients go on writing."""
        try:
            self.read_ahead()
            return replace(self._count(0), as_of=clock.now(), later=0, read_to=self._reader.last)
        except OpsError as error:
            if self.copy.since:
                self.report.fact("commits not counted", error.message)
            return self._uncounted(error.message)

    def read_ahead(self) -> None:
        """Read what was written until now, so that only the rest is read while clients wait.

        Raises:
            OpsError: WAL that the server wrote cannot be read, or it is too much.
        """
        with self.env.postgres.connect() as connection:
            ((end, timeline, system, snapshot),) = execute(connection, _WRITTEN)
        self._began = self._began or self.copy.snapshot or str(snapshot)
        self._read(lsn_of(str(end)), int(timeline), int(system), "backups", MOST_BYTES)

    def look_ahead(self) -> None:
        """As `read_ahead`, where the loss is known without a count: WAL that cannot be read now ends no run, and is not
        read while clients wait either."""
        if self._planned.count is None or self._planned.unit != "commit":
            self._why_uncounted = "the plan could not count commits"
            return
        try:
            self.read_ahead()
        except OpsError as error:
            self._why_uncounted = error.message
            self.report.fact("commits not counted", error.message)

    def judge(self) -> None:
        """Count what the copy lacks, in the transaction that replaces the live side: nobody writes there any more.

        Raises:
            LossExceeded: it is more than was confirmed.
        """
        try:
            self._read_to_the_end()
            self.loss = self._count(self._planned.read_to)
        except OpsError as error:
            self.loss = self._uncounted(error.message)
        require_confirmed(self.report, self.loss)

    @property
    def measured(self) -> Loss:
        """The loss of a copy that has passed."""
        assert self.loss
        return self.loss

    @property
    def _planned(self) -> Loss:
        return planned_loss_of(self.report, self.copy.part)

    def _read_to_the_end(self) -> None:
        """Read up to a record that is written now: also what a client committed without waiting for its WAL."""
        if self._why_uncounted:
            raise OpsError(self._why_uncounted)
        with self.env.postgres.connect() as connection:
            execute(connection, "SET synchronous_commit = local")
            execute(connection, "SET default_transaction_read_only = off")
            ((mark,),) = execute(connection, "SELECT pg_logical_emit_message(true, 'gate', '')")
            ((end, timeline, system, _),) = execute(connection, _WRITTEN)
        place, needed = (lsn_of(str(end)), int(timeline), int(system)), lsn_of(str(mark))

        def reached() -> bool:
            try:
                self._read(*place, "", MOST_BYTES_FENCED)
            except OpsError:
                self._read(*place, "backups", MOST_BYTES_FENCED)
            return self._reader.last >= needed

        what = f"the end of the live server's WAL ({lsn_text(needed)})"
        until(reached, what=what, seconds=0 if self.copy.since or self.otherwise else RECEIVED_SECONDS)

    def _read(self, end: int, timeline: int, system: int, source: Stores | Literal[""], most: int) -> None:
        """Read on up to `end` at least. `most`: bytes, where the loss can be stated without a count of commits."""
        env, copy, reader = self.env, self.copy, self._reader
        if not (copy.databases and copy.end):
            raise OpsError("there is no live database, or the copy's place in WAL is unknown")
        if system != copy.system:
            raise OpsError("the backup is from another cluster, or its manifest names none")
        supply = read_supply.work(env, source, system, timeline)
        left = supply.timeline.left_at(copy.timeline) if copy.timeline else end
        if left is None or copy.end > left:
            raise OpsError(f"timeline {timeline} does not have {lsn_text(copy.end)} of timeline {copy.timeline}")
        begin, bytes_ = max(reader.last, copy.end), supply.segment_bytes
        first, last = begin // bytes_, (end - 1) // bytes_
        if reader.last < 0 and copy.snapshot and first - 1 in supply.pieces:
            first -= 1  # a commit that the snapshot lacks may lie before its LSN
        if missing := supply.missing(first, last):
            raise OpsError(f"{missing[0]} of the live server cannot be read", "check pg_wal, and run this again")
        if (copy.since or self.otherwise) and end - begin > most:
            raise OpsError(f"more than {size(most)} of WAL was written since the backup")
        for numbers in runs_of(range(first, last + 1)):
            with _brought(env, supply, numbers) as files:
                reader.read(env.postgres, files, end)
            if (copy.since or self.otherwise) and len(reader.found) > MOST_COMMITS:
                raise OpsError(f"more than {MOST_COMMITS:,} commits were made since the backup")

    def _count(self, read_to: int) -> Loss:
        """Count what was read.

        Raises:
            OpsError: some of the commits cannot be recognized.
        """
        copy, made = self.copy, self._reader.made
        lost, begin = [one for one in self._reader.found if copy.lacks(one)], 0
        if copy.since and any(made.get((oid, 0), 0) > copy.end for oid in copy.databases):
            if not copy.named:  # before that, commits filled it
                raise OpsError(
                    "the live database was created after the backup, and it is not known when it became live"
                )
            begin = copy.named
        if self.find_files:
            files = self.find_files()
            if any(made.get(file, 0) > copy.end for file in files):
                raise OpsError("a table was rewritten since the backup")
            lost = [one for one in lost if one.may_change(files)]
        lost = [one for one in lost if one.lsn > begin and one.may_concern(copy.databases)]
        if self._began:  # a later one without changes wrote to temporary tables only
            lost = [one for one in lost if one.files or _began_before(self._began, one.xid)]
        counted = loss_of(copy.part, lost, {}, read_to)
        return replace(counted, since=copy.since)

    def _uncounted(self, why: str) -> Loss:
        if self.otherwise:
            return self.otherwise(why)
        since = self.copy.since
        return Loss.everything_since(self.copy.part, since) if since else Loss.not_known(self.copy.part, why)


def gate_of_backup(
    report: Report,
    env: Environment,
    backup: Backup,
    live_oid: int,
    part: str = "",
    find_files: Callable[[], Collection[Pair]] | None = None,
) -> DatabaseGate:
    """The gate of a database that a dump replaces, or of some of its tables (`part`, `find_files`)."""
    content = content_in(backup)
    copy = DatabaseCopy(
        *(part or env.postgres.database, lsn_of(content.lsn), content.system, (live_oid,) if live_oid else ()),
        timeline=content.timeline,
        snapshot=content.snapshot,
        since=backup.manifest.taken,
        named=read_named(env.postgres) if live_oid else 0,
    )
    return DatabaseGate(report, env, copy, find_files)


_WRITTEN = """
SELECT pg_current_wal_flush_lsn(), ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int,
       (SELECT system_identifier FROM pg_control_system()), pg_current_snapshot()::text
"""


@contextmanager
def _brought(env: Environment, supply: Supply, numbers: Sequence[int]) -> Iterator[list[tuple[Segment, Path]]]:
    with tempfile.TemporaryDirectory(prefix=".gate-", dir=spool(env)) as place:
        pieces = [supply.pieces[number] for number in numbers]
        yield [(piece.segment, supply.bring(piece, Path(place))) for piece in pieces]


def spool(env: Environment) -> Path:
    """The directory for temporary files.

    Raises:
        OpsError: it cannot be created.
    """
    directory = Path(env.backups.spool) / env.name
    with told(directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory
