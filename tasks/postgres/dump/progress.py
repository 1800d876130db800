"""How far pg_dump is, by the bytes of the tables that it has read.

Its archive tells neither which file is whose nor, compressed, how many bytes it will have. So tables are weighed by
their size on disk; PostgreSQL says which are being copied and how many rows of them are done.
https://www.postgresql.org/docs/current/progress-reporting.html#COPY-PROGRESS-REPORTING
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import Unreachable
from runbook.progress import Done
from runbook.units import size

LARGE_OBJECTS = 2613  # pg_largeobject's OID: its rows are dumped one file each
_TABLE, _LARGE_OBJECT = re.compile(r"\d+\.dat(\.\w+)?"), re.compile(r"blob_\d+\.dat(\.\w+)?")


@dataclass(frozen=True)
class Weights:
    """What is to be dumped: bytes on disk by table (OID), and how many large objects."""

    tables: dict[int, int]
    large_objects: int


def weights_of(connection: Connection, without: Sequence[tuple[str, str]] = (), *, all_: bool = True) -> Weights:
    """Of the tables that a session has locked, so that it waits for nobody; `all_`: with the large objects."""
    left = set(without)
    rows = execute(connection, _WEIGHTS)
    tables = {int(oid): int(weight) for oid, schema, table, weight in rows if (str(schema), str(table)) not in left}
    count, weight = execute(connection, _LARGE)[0]
    return Weights({**tables, LARGE_OBJECTS: int(weight)} if all_ and count else tables, int(count) if all_ else 0)


# An empty table is a file too: it weighs something.
_WEIGHTS = """
SELECT c.oid, n.nspname, c.relname, greatest(pg_table_size(c.oid), current_setting('block_size')::bigint)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (
    SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
"""
_LARGE = "SELECT count(*), pg_table_size('pg_catalog.pg_largeobject') FROM pg_catalog.pg_largeobject_metadata"


@dataclass
class DumpProgress:
    """Follows one pg_dump by looking now and then. It never tells more than what is done: a table that came and went
    between two looks counts as one of the smallest."""

    postgres: Postgres
    target: Path
    weights: Weights
    _seen: set[int] = field(default_factory=set)

    def tell(self) -> Done:
        """Bytes that are written, and the part of the tables (by their bytes) that is read.

        Raises:
            Unreachable: the server cannot tell now.
        """
        files = [path for path in (self.target, *self.target.glob("*")) if path.is_file()]
        written = sum(path.stat().st_size for path in files)
        in_hand = self._copying()
        self._seen |= in_hand.keys()
        left = self._seen - in_hand.keys()
        whole = sum(self.weights.tables.values())
        read = sum(self.weights.tables[oid] for oid in left) + sum(
            self.weights.tables[oid] * part for oid, part in in_hand.items()
        )
        read += self._unseen([path.name for path in files], len(in_hand), len(left))
        ratio = min(read / max(whole, 1), 1.0)
        return Done(f"{size(written)} dumped; of {size(whole)} in tables at least {ratio:.0%} are read", ratio)

    def _unseen(self, names: list[str], in_hand: int, left: int) -> float:
        """Bytes of what is finished by the number of files (of a directory; a script is one file, and adds nothing)."""
        count = sum(bool(_TABLE.fullmatch(name)) for name in names) - in_hand - left
        others = sorted(
            weight for oid, weight in self.weights.tables.items() if oid not in self._seen and oid != LARGE_OBJECTS
        )
        objects = sum(bool(_LARGE_OBJECT.fullmatch(name)) for name in names) / max(self.weights.large_objects, 1)
        return sum(others[: max(count, 0)]) + self.weights.tables.get(LARGE_OBJECTS, 0) * min(objects, 1.0)

    def _copying(self) -> dict[int, float]:
        """The tables in hand, and which part of each is done (by rows where their number is known, else by bytes)."""
        try:
            with self.postgres.connect(self.postgres.database) as connection:
                rows = execute(connection, _COPYING)
        except psycopg.Error as error:
            raise Unreachable(f"the progress of COPY cannot be read: {type(error).__name__}") from None
        return {
            int(oid): min(tuples / known if known > 0 else done / self.weights.tables[oid], 1.0)
            for oid, tuples, done, known in rows
            if oid in self.weights.tables
        }


_COPYING = """
SELECT p.relid::bigint, p.tuples_processed, p.bytes_processed, c.reltuples
FROM pg_stat_progress_copy p JOIN pg_class c ON c.oid = p.relid
WHERE p.datname = current_database() AND p.command = 'COPY TO'
"""
