"""The rows that transactions deleted and updated in some files, read from WAL alone.

src/backend/access/rmgrdesc/heapdesc.c
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tasks.wal.format.names import lsn_of
from tasks.wal.reading.transactions import LINE, End, Pair, parse_end

TOUCHING = ("Heap", "Transaction")
_HEAP = re.compile(
    r"tx: +(\d+), lsn: ([0-9A-F/]+), prev \S+ desc: (DELETE|UPDATE|HOT_UPDATE)\S* .*? rel \d+/(\d+)/(\d+)"
)


@dataclass(frozen=True)
class Touched:
    """A committed transaction, and how many rows it deleted or updated, by file."""

    end: End
    deleted: Mapping[Pair, int]
    updated: Mapping[Pair, int]

    @property
    def rows(self) -> int:
        """All its rows."""
        return sum(self.deleted.values()) + sum(self.updated.values())


@dataclass
class Touches:
    """The transactions that changed some files. Beyond `most`, those with the fewest rows are only counted
    (`left_out`). `open`: those without a seen end, with their rows."""

    files: frozenset[Pair]
    at_least: int = 1
    most: int = 1000
    found: list[Touched] = field(default_factory=list)
    left_out: int = 0
    _counts: dict[int, Counter[tuple[str, Pair]]] = field(default_factory=lambda: defaultdict(Counter))
    _seen: int = -1

    @property
    def open(self) -> dict[int, int]:
        """Rows by transaction."""
        return {xid: sum(counts.values()) for xid, counts in self._counts.items()}

    def read(self, lines: Iterable[str], wanted: Iterable[str] = ("DELETE", "UPDATE")) -> None:
        """Read more output of pg_waldump for `TOUCHING`; known records are skipped."""
        kinds = frozenset(wanted)
        for line in lines:
            if match := _HEAP.search(line):
                file, kind = (int(match[4]), int(match[5])), match[3].removeprefix("HOT_")
                if file in self.files and kind in kinds and (lsn := lsn_of(match[2])) > self._seen:
                    self._seen = lsn
                    self._counts[int(match[1])][kind, file] += 1
            elif "desc: COMMIT" in line or "desc: ABORT" in line:
                self._end(line)

    def _end(self, line: str) -> None:
        match = LINE.search(line)
        end = parse_end(int(match[1]), lsn_of(match[2]), match[3]) if match else None
        if not end or end.lsn <= self._seen:
            return
        self._seen = end.lsn
        counts = Counter[tuple[str, Pair]]()
        for xid in (end.xid, *end.inner):
            counts.update(self._counts.pop(xid, {}))
        if not end.committed or not counts:
            return
        deleted, updated = (
            {file: rows for (kind, file), rows in counts.items() if kind == wanted} for wanted in ("DELETE", "UPDATE")
        )
        touched = Touched(end, deleted, updated)
        if touched.rows >= self.at_least:
            self.found.append(touched)
            self._prune()
        else:
            self.left_out += 1

    def _prune(self) -> None:
        if len(self.found) > 2 * self.most:
            largest = sorted(self.found, key=lambda one: one.rows, reverse=True)[: self.most]
            self.left_out += len(self.found) - len(largest)
            self.found = sorted(largest, key=lambda one: one.end.lsn)
