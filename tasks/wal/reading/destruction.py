"""Statements in WAL that dropped a database or emptied a table: the transaction, and the last place before it.

DROP DATABASE deletes the files before its transaction commits (XLOG_DBASE_DROP), and marks the database as invalid
before that, outside the transaction. A recovery must therefore stop before the transaction's first record.

src/backend/commands/dbcommands.c: dropdb; src/backend/access/rmgrdesc/dbasedesc.c
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blocks.postgres.server import Postgres
from runbook import clock
from tasks.wal.format.names import Segment, lsn_of, lsn_text
from tasks.wal.reading.touches import TOUCHING, Touches
from tasks.wal.reading.transactions import DEFINING, LINE, Definitions, End, Pair, parse_end
from tasks.wal.reading.waldump import lines_in

Statement = Literal["DROP DATABASE", "DROP TABLE", "TRUNCATE", "DELETE"]
Files = Sequence[tuple[Segment, Path]]

MOST_BACK = 1 << 26
"""Bytes of WAL before a DROP DATABASE in which its transaction began: it waits for one checkpoint only."""
LEAST_DELETED = 10
_DROP = re.compile(r"DROP dir (.*)")
_DIRECTORY = re.compile(r"(?:\d+|base|pg_tblspc/\d+(?:/[^/ ]+)?)/(\d+)")
_ANY = ("Heap", "Heap2", "Btree", *DEFINING)


@dataclass(frozen=True)
class Destruction:
    """One committed transaction that destroyed data. `begin`: the LSN of its first record, before which a recovery
    stops; `database`: the OID; `tables`: the names of the emptied ones."""

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
        return (
            f"{self.what} by transaction {self.end.xid}, committed {clock.text(self.end.at, 'microseconds')}, "
            f"at {lsn_text(self.end.lsn)}"
        )


@dataclass
class DroppedDatabases:
    """The databases that committed transactions dropped, in the order of WAL; `created`: the LSN of the newest CREATE
    DATABASE."""

    found: list[Destruction] = field(default_factory=list)
    created: int = 0
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
            self.created = lsn
        elif (end := parse_end(xid, lsn, text)) and end.xid in self._open:
            at, oids = self._open.pop(end.xid)
            self.found += [Destruction("DROP DATABASE", end, at, oid) for oid in dict.fromkeys(oids) if end.committed]


@dataclass
class WalDefinitions:
    """What a range of WAL did to whole databases and whole tables."""

    databases: DroppedDatabases
    tables: Definitions


def read_definitions(postgres: Postgres, files: Files, databases: Iterable[int], start: int) -> WalDefinitions:
    """Read WAL for dropped databases, and for tables of `databases` (OIDs) that were truncated or dropped.

    Raises:
        CommandFailed: pg_waldump failed.
    """
    found = WalDefinitions(DroppedDatabases(), Definitions(frozenset(databases)))
    lines = lines_in(postgres, files, DEFINING, start=start)
    found.tables.read(found.databases.watch(lines))
    return found


def begin_of(postgres: Postgres, files: Files, destruction: Destruction) -> int:
    """The LSN of the first record of its transaction, at most `MOST_BACK` earlier."""
    begin = max(files[0][0].start, destruction.begin - MOST_BACK)
    near = [one for one in files if one[0].end > begin and one[0].start <= destruction.end.lsn]
    everyone = {destruction.end.xid, *destruction.end.inner}
    for line in lines_in(postgres, near, _ANY, start=max(begin, near[0][0].start)):
        if (match := LINE.search(line) or _RECORD.search(line)) and int(match[1]) in everyone:
            return min(lsn_of(match[2]), destruction.begin)
    return destruction.begin


_RECORD = re.compile(r"tx: +(\d+), lsn: ([0-9A-F/]+), ")


def find_emptied(
    postgres: Postgres,
    files: Files,
    definitions: Definitions,
    emptied: Mapping[str, tuple[Pair, Pair]],
    missing: Collection[str],
    rows: Mapping[str, int],
    start: int,
) -> list[Destruction]:
    """The transactions that emptied tables which are empty or missing now, in the order of WAL.

    `emptied`: the OID and the file of each empty table; `rows`: those that each table had. A missing table has no OID
    any more: every transaction that dropped relations may be the one. `DELETE`: only a transaction that deleted at
    least half of a table's rows at once; a queue that its workers emptied is no destruction.
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
        touches.read(lines_in(postgres, files, TOUCHING, start=start), ("DELETE",))
        for touched in touches.found:
            names = tuple(
                sorted(files_of[file] for file, count in touched.deleted.items() if 2 * count >= rows[files_of[file]])
            )
            database = next(iter(touched.deleted))[0]
            found += [Destruction("DELETE", touched.end, touched.end.lsn, database, names)] if names else []
    return sorted(found, key=lambda one: one.end.lsn)
