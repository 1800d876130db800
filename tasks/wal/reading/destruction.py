"""Statements in WAL that dropped a database or emptied a table: the transaction, and the last place before it.

DROP DATABASE deletes the files before its transaction commits (XLOG_DBASE_DROP). Before that it marks the database as
invalid: it updates its row in pg_database in place, which holds whether or not the transaction commits. The transaction
may get its ID only afterwards, when it deletes that row. A recovery must therefore stop before the mark.

src/backend/commands/dbcommands.c: dropdb; src/backend/access/rmgrdesc/dbasedesc.c, heapdesc.c
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from blocks.postgres.server import Postgres
from runbook import clock
from runbook.errors import VerificationFailed
from tasks.wal.format.names import lsn_of, lsn_text
from tasks.wal.format.pages import Files
from tasks.wal.format.records import read_record, row_in
from tasks.wal.reading.touches import TOUCHING, Touches
from tasks.wal.reading.transactions import DEFINING, LINE, Definitions, End, Pair, parse_end
from tasks.wal.reading.waldump import LSN, MAXIMUM, Commit, lines_in, must_reach

Statement = Literal["DROP DATABASE", "DROP TABLE", "TRUNCATE", "DELETE"]

MARKS_SINCE = 150004
"""The first version that marks a database as invalid before it drops it."""
LEAST_DELETED = 10
_DROP = re.compile(r"DROP dir (.*)")
_DIRECTORY = re.compile(r"(?:\d+|base|pg_tblspc/\d+(?:/[^/ ]+)?)/(\d+)")
_ROW = re.compile(
    r"lsn: (?P<lsn>[0-9A-F/]+), .*desc: (?P<what>DELETE|INPLACE) .*?\boff:? (?P<off>\d+)\b.* "
    r"rel (?P<relation>1664/0/\d+) blk (?P<block>\d+)"
)
_BACK = (4, 32, 256)
"""How many segments back the beginning of a DROP DATABASE is searched for, before all WAL is: after the mark it waits
for a checkpoint only."""


@dataclass(frozen=True)
class Destruction:
    """One transaction that destroyed data. `begin`: the LSN of its first trace, before which a recovery stops;
    `database`: the OID; `tables`: the names of the emptied ones. Only a DROP DATABASE does it without a commit: where
    it was interrupted, `end` is where it marked the database as invalid, without a transaction ID."""

    statement: Statement
    end: End
    begin: int
    database: int
    tables: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """`TRUNCATE of public.users`."""
        return f"{self.statement} of {', '.join(self.tables)}" if self.tables else self.statement

    @property
    def text(self) -> str:
        """The statement, its transaction, time and place."""
        if not self.end.committed:
            return f"{self.what}, which was interrupted, at {lsn_text(self.end.lsn)}"
        return (
            f"{self.what} by transaction {self.end.xid}, committed {clock.text(self.end.at, 'microseconds')}, "
            f"at {lsn_text(self.end.lsn)}"
        )


@dataclass
class DroppedDatabases:
    """The databases that committed transactions dropped, in the order of WAL; `created`: the LSN of each CREATE
    DATABASE."""

    found: list[Destruction] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    _open: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def watch(self, lines: Iterable[str]) -> Iterator[str]:
        """Pass the output of pg_waldump for `DEFINING` on, and read it."""
        for line in lines:
            if "desc: DROP dir" in line or "desc: CREATE" in line or (self._open and "desc: COMMIT" in line):
                self._read(line)
            yield line

    def _read(self, line: str) -> None:
        if not (match := LINE.search(line)):
            return
        xid, lsn, text = int(match[1]), lsn_of(match[2]), match[3]
        if "rmgr: Database" in line and (dropped := _DROP.match(text)):
            self._open.setdefault(xid, (lsn, []))[1].extend(map(int, _DIRECTORY.findall(dropped[1])))
        elif "rmgr: Database" in line:
            self.created.append(lsn)
        elif (end := parse_end(xid, lsn, text)) and end.xid in self._open:
            at, oids = self._open.pop(end.xid)
            self.found += [Destruction("DROP DATABASE", end, at, oid) for oid in dict.fromkeys(oids) if end.committed]


@dataclass
class WalDefinitions:
    """What a range of WAL did to whole databases and whole tables, up to at least the record at `newest`."""

    databases: DroppedDatabases
    tables: Definitions
    newest: int


def read_definitions(
    postgres: Postgres, files: Files, databases: Iterable[int], start: int, newest: int
) -> WalDefinitions:
    """Read WAL for dropped databases, and for tables of `databases` (OIDs) that were truncated or dropped, from `start`
    up to at least the record at `newest`.

    Raises:
        VerificationFailed: it does not decode up to there.
        CommandFailed: pg_waldump failed.
    """
    found = WalDefinitions(DroppedDatabases(), Definitions(frozenset(databases)), newest)
    lines = lines_in(postgres, files, DEFINING, start=start, stopped=must_reach(newest))
    found.tables.read(found.databases.watch(lines))
    return found


def begin_of_drop(postgres: Postgres, files: Files, drop: Commit, *, start: int, marks: bool) -> int:
    """The LSN of the first trace of a DROP DATABASE: the in-place update that marks the database as invalid (`marks`:
    this version does that), or an earlier record of its transaction. `start`: the end of the base backup.

    Raises:
        VerificationFailed: it is not after `start`, or the WAL does not decode up to its commit.
        CommandFailed: pg_waldump failed.
    """
    until = [one for one in files if one[0].end > start and one[0].start <= drop.lsn]
    for back in (*_BACK, len(until)):
        near = until[-back:]
        begin = _begin_in(postgres, near, drop, marks=marks)
        # The records of a transaction that reaches back beyond the first of these segments may begin even earlier.
        if begin and (begin >= near[0][0].end or (near == until and begin >= start)):
            return begin
    raise VerificationFailed(
        f"the beginning of the DROP DATABASE by transaction {drop.xid} is not in the WAL from {lsn_text(start)} on",
        "give an older base backup (backup=…): this one was taken during the DROP DATABASE",
    )


def _begin_in(postgres: Postgres, files: Files, drop: Commit, *, marks: bool) -> int:
    """The first trace in these segments; 0 if the deletion of the database's row, or its mark, is not there."""
    own = list(lines_in(postgres, files, [], only=[f"--xid={drop.xid}"], stopped=must_reach(drop.lsn)))
    deleted = [row for line in own if (row := _ROW.search(line)) and row["what"] == "DELETE"]
    if not deleted:
        return 0
    row, first = deleted[-1], LSN.search(own[0])
    assert first
    if not marks:
        return lsn_of(first[1])
    at = DatabaseRow(row["relation"], int(row["block"]), int(row["off"]))
    deletion = lsn_of(row["lsn"])
    return min(find_mark(postgres, files, at, newest=deletion, before=deletion), lsn_of(first[1]))


@dataclass(frozen=True)
class DatabaseRow:
    """The place of a database's row: the file of pg_database as `1664/0/1262`, the block, and the number in it."""

    relation: str
    block: int
    off: int


def find_mark(postgres: Postgres, files: Files, row: DatabaseRow, *, newest: int, before: int = MAXIMUM) -> int:
    """The LSN of the in-place update before `before` that marked a database as invalid; 0 if it is not in these
    segments, which decode up to `newest`.

    A DROP DATABASE that is repeated after an interrupted one marks it again: then it is the first of these updates, as
    far as their content can be read. VACUUM updates the row in place too.

    Raises:
        VerificationFailed: the WAL does not decode up to `newest`.
        CommandFailed: pg_waldump failed.
    """
    only = [f"--relation={row.relation}", f"--block={row.block}"]
    lines = lines_in(postgres, files, ["Heap"], only=only, stopped=must_reach(newest))
    updates = (one for one in map(_ROW.search, lines) if one and one["what"] == "INPLACE")
    of_row = [lsn for one in updates if int(one["off"]) == row.off and (lsn := lsn_of(one["lsn"])) < before]
    mark = 0
    for lsn in reversed(of_row):
        content = row_in(read_record(files, lsn), row.off)
        is_mark = not mark if content is None else _LIMIT.unpack_from(content, _LIMIT_AT)[0] == _INVALID
        if not is_mark:
            break
        mark = lsn
    return mark


# src/include/catalog/pg_database.h: datconnlimit, DATCONNLIMIT_INVALID_DB
_LIMIT, _LIMIT_AT, _INVALID = struct.Struct("<i"), 80, -2


def find_emptied(
    postgres: Postgres,
    files: Files,
    definitions: Definitions,
    emptied: Mapping[str, tuple[Pair, Pair]],
    missing: Collection[str],
    rows: Mapping[str, int],
    start: int,
    newest: int,
) -> list[Destruction]:
    """The transactions that emptied tables which are empty or missing now, in the order of WAL.

    `emptied`: the OID and the file of each empty table; `rows`: those that each table had. A missing table has no OID
    any more: every transaction that dropped relations may be the one. `DELETE`: only a transaction that deleted at
    least half of a table's rows at once; a queue that its workers emptied is no destruction. `start`, `newest`: see
    `read_definitions`.
    """
    found = list[Destruction]()
    for one in definitions.found:
        names = tuple(sorted(name for name, (oid, _) in emptied.items() if one.does_to(oid) == "TRUNCATE"))
        database = next(iter({oid[0] for oid in (*one.locked, *one.end.dropped)}), 0)
        if names:
            found.append(Destruction("TRUNCATE", one.end, one.end.lsn, database, names))
        elif missing and one.end.files and one.end.dropped - one.transient:
            found.append(Destruction("DROP TABLE", one.end, one.end.lsn, database, tuple(sorted(missing))))
    files_of = {file: name for name, (_, file) in emptied.items()}
    if files_of:
        touches = Touches(frozenset(files_of), LEAST_DELETED)
        lines = lines_in(postgres, files, TOUCHING, start=start, stopped=must_reach(newest))
        touches.read(lines, ("DELETE",))
        for touched in touches.found:
            names = tuple(
                sorted(files_of[file] for file, count in touched.deleted.items() if 2 * count >= rows[files_of[file]])
            )
            database = next(iter(touched.deleted))[0]
            found += [Destruction("DELETE", touched.end, touched.end.lsn, database, names)] if names else []
    return sorted(found, key=lambda one: one.end.lsn)
