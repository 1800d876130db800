"""Rows and hashes of tables, read by one session, or by several in the same snapshot.

A large table is read in parts, by ranges of its pages: the sums of two parts add up to those of the whole.
https://www.postgresql.org/docs/current/ddl-system-columns.html
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from psycopg import sql
from pydantic import BaseModel, ConfigDict

from blocks.postgres.server import Connection, execute
from tasks.postgres.content import queries
from tasks.postgres.content.pinned_session import BATCH
from tasks.postgres.content.rowhash import row_hash

PART_PAGES = 8192
"""64 MB: what one session reads within a second."""
_Columns = tuple[tuple[str, str | None], ...]


class TableSum(BaseModel):
    """A table's number of rows, the sum of their texts' hashes, and bytes on disk (which are not compared)."""

    model_config = ConfigDict(frozen=True)
    rows: int
    hash: str
    bytes: int = 0


@dataclass(frozen=True)
class TablePart:
    """Pages of a table, from `first` up to `end` (None: its last one), and the unit that it is counted in."""

    schema: str
    table: str
    columns: _Columns
    unit: str
    first: int = 0
    end: int | None = None

    def query(self) -> sql.Composed:
        """Its rows and the sum of their hashes, without inheritance children."""
        text = "SELECT count(*), coalesce(sum({}::numeric), 0) FROM ONLY {}"
        read = sql.SQL(text).format(row_hash(self.columns), sql.Identifier(self.schema, self.table))
        bounds = [(">=", self.first)] * bool(self.first) + ([] if self.end is None else [("<", self.end)])
        limits = [sql.SQL("ctid {} {}::tid").format(sql.SQL(sign), f"({page},0)") for sign, page in bounds]
        return read + sql.SQL(" WHERE ") + sql.SQL(" AND ").join(limits) if limits else read


@dataclass
class TableSums:
    """What is still to be read, and what was found, by the unit's name. Sessions take the parts from one queue."""

    found: dict[str, TableSum]
    _waiting: deque[TablePart]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, connection: Connection, chosen: Collection[str] | None, *, in_parts: bool = False) -> TableSums:
        """Of every table, or of the `chosen` units; largest first. `in_parts`: a large table can be shared.

        One session reads whole tables: the server's parallel workers read no range of pages.
        """
        found, waiting = dict[str, TableSum](), deque[TablePart]()
        for schema, table, columns, size, unit, pages in execute(connection, queries.TABLES):
            if chosen is None or unit in chosen:
                before = found.get(unit, TableSum(rows=0, hash="0"))
                found[unit] = before.model_copy(update={"bytes": before.bytes + int(size)})
                names = tuple((str(name), kind) for name, kind in columns)
                bounds = range(PART_PAGES, (pages or 0) if in_parts else 0, PART_PAGES)
                for first, end in zip((0, *bounds), (*bounds, None), strict=True):
                    waiting.append(TablePart(schema, table, names, unit, first, end))
        return cls(found, waiting)

    def read(self, connection: Connection) -> None:
        """Read what is still waiting. Each batch is read in a savepoint that is rolled back: see `in_batches`."""
        while self._waiting:
            with connection.transaction(force_rollback=True):
                for part in self._taken(BATCH):
                    try:
                        rows, total = execute(connection, part.query())[0]
                    except BaseException:
                        self._waiting.appendleft(part)
                        raise
                    self._add(part, int(rows), int(total))

    def stop(self) -> None:
        """Nobody needs the rest."""
        self._waiting.clear()

    def _taken(self, most: int) -> Iterator[TablePart]:
        for _ in range(most):
            try:
                yield self._waiting.popleft()
            except IndexError:
                return

    def _add(self, part: TablePart, rows: int, total: int) -> None:
        with self._lock:
            before = self.found[part.unit]
            self.found[part.unit] = TableSum(
                rows=before.rows + rows, hash=str(int(before.hash) + total), bytes=before.bytes
            )
