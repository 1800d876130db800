"""The transactions that committed after a position in WAL, each with the databases that it wrote to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from blocks.postgres.server import Postgres
from tasks.wal.format.names import lsn_of
from tasks.wal.format.pages import Files
from tasks.wal.reading.transactions import LINE, Pair, parse_end
from tasks.wal.reading.waldump import LSN, MAXIMUM, at_the_end, lines_in

_RECORD = re.compile(r"tx: +(\d+), lsn: ")
_FILE = re.compile(r"(?:blkref #\d+: rel \d+/|base/|pg_tblspc/\d+/[^/ ]+/)(\d+)/(\d+)")
_MADE = re.compile(r"desc: CREATE (?:base|pg_tblspc/\d+)/(?:[^/]+/)?(\d+)/(\d+)$")
_DATABASE = re.compile(r"desc: CREATE\w* (?:create|copy) dir .*/(\d+)$")
# No row is lost with these: VACUUM writes them, or a row's change does besides, or they lock rows.
_UPKEEP = re.compile(
    r"rmgr: (?:(?:Btree|Hash|Gin|Gist|SPGist|BRIN|Standby) |Heap2 .*desc: (?!MULTI_INSERT)"
    r"|Heap .*desc: (?:INPLACE|LOCK)\b|Storage .*desc: TRUNCATE)"
)
STATISTICS = frozenset({2619, 2840, 3429})
"""The files of what ANALYZE writes: pg_statistic, its TOAST table, pg_statistic_ext_data."""


@dataclass(frozen=True)
class Committed:
    """A committed transaction: its ID, its commit record's LSN and time, and the files in which it changed rows
    (database's OID, filenode; 0 for what all databases share, and for upkeep; none: its changes lie before the WAL that
    was read)."""

    xid: int
    lsn: int
    at: datetime
    files: frozenset[Pair] = frozenset()

    @property
    def databases(self) -> frozenset[int]:
        """The OIDs of the databases that it changed."""
        return frozenset(database for database, _ in self.files)

    def may_concern(self, databases: Collection[int]) -> bool:
        """Whether it changed one of those databases, or may have."""
        return not self.files or not self.databases.isdisjoint(databases)

    def may_change(self, files: Collection[Pair]) -> bool:
        """Whether it changed one of those files, or may have."""
        return not self.files or not self.files.isdisjoint(files)


@dataclass
class CommitReader:
    """Reads the commits of one history in parts, each from where the last one ended: a transaction may span them.

    `found`: the commits. `last`: the LSN of the last record. `made`: the LSN at which a file was created, or a database
    (filenode 0)."""

    found: list[Committed] = field(default_factory=list)
    last: int = -1
    made: dict[Pair, int] = field(default_factory=dict)
    _changed: dict[int, set[Pair]] = field(default_factory=dict)

    def read(self, postgres: Postgres, files: Files, until: int = MAXIMUM) -> None:
        """Read on, in consecutive segments. `until`: the WAL before it is complete.

        Raises:
            VerificationFailed: WAL before `until` does not decode, although later records exist.
            CommandFailed: pg_waldump failed otherwise.
        """
        line = ""
        try:
            for line in lines_in(postgres, files, [], stopped=at_the_end(files, until), start=self.last + 1):
                if "desc: COMMIT" in line or "desc: ABORT" in line:
                    self._end(line)
                elif (match := _RECORD.search(line)) and match[1] != "0":
                    self._change(int(match[1]), line)
        finally:
            if match := LSN.search(line):
                self.last = lsn_of(match[1])

    def _change(self, xid: int, line: str) -> None:
        changed = None if _UPKEEP.match(line) else _FILE.search(line)  # a record changes rows of one file
        file = (int(changed[1]), int(changed[2])) if changed else (0, 0)
        self._changed.setdefault(xid, set()).add((0, 0) if file[1] in STATISTICS else file)
        if "desc: CREATE" not in line:
            return
        if made := _MADE.search(line.rstrip()):
            self.made[int(made[1]), int(made[2])] = _lsn(line)
        elif database := _DATABASE.search(line.rstrip()):
            self.made[int(database[1]), 0] = _lsn(line)

    def _end(self, line: str) -> None:
        if not (match := LINE.search(line)) or not (end := parse_end(int(match[1]), lsn_of(match[2]), match[3])):
            return
        changed = {file for xid in (end.xid, *end.inner) for file in self._changed.pop(xid, ())}
        if end.committed:
            self.found.append(Committed(end.xid, end.lsn, end.at, frozenset(changed)))


def _lsn(line: str) -> int:
    match = LSN.search(line)
    return lsn_of(match[1]) if match else 0


def read_committed(postgres: Postgres, files: Files, after: int, until: int = MAXIMUM) -> list[Committed]:
    """Every transaction whose commit record begins after the LSN `after`, in consecutive segments of one history: the
    newest that there are. See `CommitReader.read`."""
    reader = CommitReader()
    reader.read(postgres, files, until)
    return [one for one in reader.found if one.lsn > after]


def count_by_database(found: Sequence[Committed], names: Mapping[int, str]) -> Counter[str]:
    """Count how many of them changed each database; by its name where that is known."""
    counts = Counter[str]()
    for one in found:
        counts.update(names.get(oid, f"OID {oid}") for oid in one.databases if oid)
    return counts
