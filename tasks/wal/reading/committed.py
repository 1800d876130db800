"""The transactions that committed after a position in WAL, each with the databases that it wrote to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from blocks.postgres.server import Postgres
from tasks.wal.format.names import lsn_of
from tasks.wal.format.pages import Files
from tasks.wal.reading.transactions import LINE, parse_end
from tasks.wal.reading.waldump import MAXIMUM, at_the_end, lines_in

_RECORD = re.compile(r"tx: +(\d+), lsn: ")
_FILE = re.compile(r"(?:blkref #\d+: rel \d+/|base/|pg_tblspc/\d+/[^/ ]+/)(\d+)/")


@dataclass(frozen=True)
class Committed:
    """A committed transaction: its ID, its commit record's LSN and time, and the OIDs of the databases whose files it
    changed (0: what all share; none: its changes lie before the WAL that was read)."""

    xid: int
    lsn: int
    at: datetime
    databases: frozenset[int] = frozenset()

    def may_concern(self, databases: Collection[int]) -> bool:
        """Whether it changed one of those databases, or may have."""
        return not self.databases or not self.databases.isdisjoint(databases)


@dataclass
class _Reading:
    written: dict[int, set[int]] = field(default_factory=dict)
    found: list[Committed] = field(default_factory=list)

    def read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if "desc: COMMIT" in line or "desc: ABORT" in line:
                self._end(line)
            elif (match := _RECORD.search(line)) and match[1] != "0":
                changed = _FILE.search(line)  # a record changes files of one database
                self.written.setdefault(int(match[1]), set()).add(int(changed[1]) if changed else 0)

    def _end(self, line: str) -> None:
        if not (match := LINE.search(line)) or not (end := parse_end(int(match[1]), lsn_of(match[2]), match[3])):
            return
        changed = {oid for xid in (end.xid, *end.inner) for oid in self.written.pop(xid, ())}
        if end.committed:
            self.found.append(Committed(end.xid, end.lsn, end.at, frozenset(changed)))


def read_committed(postgres: Postgres, files: Files, after: int, until: int = MAXIMUM) -> list[Committed]:
    """Every transaction whose commit record begins after the LSN `after`, in consecutive segments of one history: the
    newest that there are. `until`: the WAL before it is complete.

    Raises:
        VerificationFailed: WAL before `until` does not decode, although later records exist.
        CommandFailed: pg_waldump failed otherwise.
    """
    reading = _Reading()
    reading.read(lines_in(postgres, files, [], stopped=at_the_end(files, until)))
    return [one for one in reading.found if one.lsn > after]


def count_by_database(found: Sequence[Committed], names: Mapping[int, str]) -> Counter[str]:
    """Count how many of them changed each database; by its name where that is known."""
    counts = Counter[str]()
    for one in found:
        counts.update(names.get(oid, f"OID {oid}") for oid in one.databases if oid)
    return counts
