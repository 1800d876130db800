"""Transactions that truncated, rewrote or dropped a relation, read from WAL alone. (Rows: `touches`.)

WAL identifies a relation by its OID, and its rows by their file (filenode). To truncate, rewrite or drop a relation, a
transaction takes an exclusive lock, which WAL has by OID (Standby/LOCK). The commit record has the deleted files
(`rels:`) and the dropped OIDs (`dropped stats:`, from version 15 on). With these the earlier files of a relation are
found without the catalog of that time.

src/backend/access/rmgrdesc/xactdesc.c, standbydesc.c, smgrdesc.c
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from tasks.wal.format.names import lsn_of

Pair = tuple[int, int]
"""(database's OID, filenode) or (database's OID, relation's OID)."""

Kind = Literal["DELETE", "UPDATE", "TRUNCATE", "DROP"]
DEFINING = ("Transaction", "Standby", "Storage", "Database")

LINE = re.compile(r"tx: +(\d+), lsn: ([0-9A-F/]+), prev \S+ desc: (.*)")
_END = re.compile(r"(COMMIT|ABORT)(?:_PREPARED (\d+):)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?) UTC(.*)")
_LOCK = re.compile(r"xid (\d+) db (\d+) rel (\d+)")
_CREATE = re.compile(r"CREATE (base|pg_tblspc/\d+)/(?:[^/]+/)?(\d+)/(\d+)$")
_DATABASE = re.compile(r"CREATE\w* (?:create|copy) dir .*/(\d+)$")
_SPACE = re.compile(r"(base|pg_tblspc/\d+)/")
_FILE = re.compile(r"(?:base|pg_tblspc/\d+/[^/ ]+)/(\d+)/(\d+)(?![\w])")
_DROPPED = re.compile(r"(?<= )2/(\d+)/(\d+)(?![\w/])")
_XACTS = re.compile(r" xacts: ([\d ]+)")


@dataclass(frozen=True)
class End:
    """The end of a transaction. `lsn`: the beginning of that record; `files` and `dropped`: what it deleted."""

    xid: int
    lsn: int
    at: datetime
    committed: bool
    inner: tuple[int, ...] = ()
    files: tuple[Pair, ...] = ()
    dropped: frozenset[Pair] = frozenset()
    spaces: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Definition:
    """A committed transaction that deleted files: the relations that it locked exclusively, the files that it created
    and deleted, in order, and the tablespaces of the created ones."""

    end: End
    locked: frozenset[Pair]
    made: tuple[Pair, ...]
    spaces: frozenset[str] = frozenset()

    @property
    def transient(self) -> set[Pair]:
        """The relation that a rewrite (VACUUM FULL, CLUSTER, ALTER TABLE) creates and drops. Its first file has its OID
        as name, and becomes the file of the rewritten relation."""
        return set(self.made) & self.end.dropped

    @property
    def pairs(self) -> list[tuple[Pair, Pair]]:
        """Each deleted file and its successor, if nothing else was dropped: files are deleted in the order in which the
        new ones are created, and listed last one first."""
        if self.end.dropped or len(self.end.files) != len(self.made):
            return []
        return list(zip(reversed(self.end.files), self.made, strict=True))

    def does_to(self, oid: Pair) -> Literal["", "TRUNCATE", "DROP", "rewrite"]:
        """Its effect on a relation."""
        if oid in self.end.dropped:
            return "DROP"
        if oid not in self.locked or not self.end.files:
            return ""
        if self.transient or (self.pairs and self.spaces != self.end.spaces):
            return "rewrite"
        return "TRUNCATE" if self.pairs else ""

    def files_of(self, known: set[Pair]) -> set[Pair]:
        """The files of a relation before and after it, derived from the known ones."""
        found = {file for pair in self.pairs if known & set(pair) for file in pair}
        if self.transient and known & {*self.transient, *self.end.files}:
            found |= self.guessed | self.transient
        return found

    @property
    def guessed(self) -> set[Pair]:
        """The file of the table, deleted with those of its TOAST and indexes: created first, it has the lowest
        number."""
        return {min(self.end.files)} if self.end.files else set()


def trace(definitions: Sequence[Definition], oid: Pair, known: set[Pair]) -> set[Pair]:
    """Every file of a relation in a range of WAL, derived from those in its catalogs."""
    own = [one for one in definitions if one.does_to(oid)]
    files = set(known)
    for one in (*reversed(own), *own):
        files |= one.files_of(files)
    for one in own:
        if not files & {*one.end.files, *one.made}:
            files |= one.guessed
    return files


@dataclass
class Definitions:
    """The content of a range of WAL: the transactions that deleted files of some databases, and all created files; the
    number of commits, the first and the last one; the transactions in progress at its beginning, and those of them that
    committed in it (`begun`); the created databases with their LSN; where the transaction `swap` committed (0: not in
    it)."""

    databases: frozenset[int]
    swap: int = 0
    swapped: int = 0
    made: set[Pair] = field(default_factory=set)
    found: list[Definition] = field(default_factory=list)
    commits: int = 0
    first: End | None = None
    last: End | None = None
    running: frozenset[int] | None = None
    begun: list[End] = field(default_factory=list)
    databases_made: dict[int, int] = field(default_factory=dict)
    _locked: dict[int, set[Pair]] = field(default_factory=lambda: defaultdict(set))
    _made: dict[int, list[tuple[str, Pair]]] = field(default_factory=lambda: defaultdict(list))
    _seen: int = -1

    def read(self, lines: Iterable[str]) -> None:
        """Read more output of pg_waldump for `DEFINING`; known records are skipped."""
        for line in lines:
            if not (match := LINE.search(line)) or (lsn := lsn_of(match[2])) <= self._seen:
                continue
            self._seen = lsn
            if end := parse_end(int(match[1]), lsn, match[3]):
                self._end(end)
            elif made := _CREATE.match(match[3]):
                self._made[int(match[1])].append((made[1], (int(made[2]), int(made[3]))))
            elif database_made := _DATABASE.match(match[3]):
                self.databases_made[int(database_made[1])] = lsn
            elif match[3].startswith("LOCK"):
                for xid, database, oid in _LOCK.findall(match[3]):
                    self._locked[int(xid)].add((int(database), int(oid)))
            elif self.running is None and match[3].startswith("RUNNING_XACTS"):
                running = _XACTS.search(match[3])
                self.running = frozenset(map(int, running[1].split())) if running else frozenset()

    def _end(self, end: End) -> None:
        everyone = (end.xid, *end.inner)
        locked = frozenset(pair for xid in everyone for pair in self._locked.pop(xid, ()))
        files = [one for xid in sorted(everyone) for one in self._made.pop(xid, ())]
        made = tuple(file for _, file in files)
        if not end.committed:
            return
        self.commits += 1
        if self.swap in everyone:
            self.swapped = end.lsn
        if self.running and self.running.intersection(everyone):
            self.begun.append(end)
        self.first, self.last = self.first or end, end
        self.made |= {file for file in made if file[0] in self.databases}
        if any(database in self.databases for database, _ in (*end.files, *end.dropped)):
            self.found.append(Definition(end, locked, made, frozenset(space for space, _ in files)))


def parse_end(tx: int, lsn: int, text: str) -> End | None:
    """The end of a transaction from pg_waldump's description of a Transaction record; None for another record."""
    if not (match := _END.match(text)):
        return None
    xid, at = int(match[2] or tx), datetime.fromisoformat(match[3]).replace(tzinfo=UTC)
    if not match[4]:  # most of them
        return End(xid, lsn, at, match[1] == "COMMIT")
    parts = {name.strip(): rest for name, _, rest in (part.partition(":") for part in match[4].split(";"))}
    return End(
        xid=xid,
        lsn=lsn,
        at=at,
        committed=match[1] == "COMMIT",
        inner=tuple(int(word) for word in parts.get("subxacts", "").split()),
        files=tuple((int(a), int(b)) for a, b in _FILE.findall(parts.get("rels", ""))),
        dropped=frozenset((int(a), int(b)) for a, b in _DROPPED.findall(parts.get("dropped stats", ""))),
        spaces=frozenset(_SPACE.findall(parts.get("rels", ""))),
    )
