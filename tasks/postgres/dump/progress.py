"""The progress of pg_dump, by the bytes of the tables that it has read.

Its archive does not show which file belongs to which table, nor the final compressed size. So tables are weighted by
their size on disk; PostgreSQL reports the running COPYs and their rows.
https://www.postgresql.org/docs/current/progress-reporting.html#COPY-PROGRESS-REPORTING
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from blocks.postgres.server import Connection, Postgres, execute
from runbook.errors import Unreachable
from runbook.progress import WorkDone
from runbook.units import size

LARGE_OBJECTS = 2613  # pg_largeobject's OID: its rows are dumped one file each
_TABLE, _LARGE_OBJECT = re.compile(r"\d+\.dat"), re.compile(r"blob_\d+\.dat")


@dataclass(frozen=True)
class Weights:
    """The work of a dump: bytes on disk by table (OID), and the number of large objects."""

    tables: dict[int, int]
    large_objects: int


def weights_of(connection: Connection, without: Sequence[tuple[str, str]] = (), *, all_: bool = True) -> Weights:
    """The weights of tables that this session has locked, so that it does not wait; `all_`: with large objects."""
    left = set(without)
    rows = execute(connection, _WEIGHTS)
    tables = {int(oid): int(weight) for oid, schema, table, weight in rows if (str(schema), str(table)) not in left}
    count, weight = execute(connection, _LARGE)[0]
    return Weights({**tables, LARGE_OBJECTS: int(weight)} if all_ and count else tables, int(count) if all_ else 0)


# An empty table is a file too, so it has a weight.
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
    """The progress of one pg_dump, by polling. It never overestimates: a table copied between two polls counts as one
    of the smallest."""

    postgres: Postgres
    target: Path
    weights: Weights
    _seen: set[int] = field(default_factory=set)

    def read(self) -> WorkDone:
        """The written bytes, and the share of the tables (by bytes) that is read.

        Raises:
            Unreachable: the server does not answer now.
        """
        files = dict[str, int]()
        for path in (self.target, *self.target.glob("*")):
            with suppress(OSError):  # it was compressed meanwhile: then its text is removed
                if path.is_file():  # a file that is being compressed is there twice
                    if path.suffix == ".dat":
                        files.setdefault(path.name, path.stat().st_size)
                    else:
                        files[path.stem] = path.stat().st_size
        written = sum(files.values())
        current = self._copying()
        self._seen |= current.keys()
        finished = self._seen - current.keys()
        whole = sum(self.weights.tables.values())
        read = sum(self.weights.tables[oid] for oid in finished) + sum(
            self.weights.tables[oid] * part for oid, part in current.items()
        )
        read += self._unseen(files, len(current), len(finished))
        ratio = min(read / max(whole, 1), 1.0)
        return WorkDone(f"{size(written)} dumped; of {size(whole)} in tables at least {ratio:.0%} are read", ratio)

    def _unseen(self, names: Collection[str], current: int, finished: int) -> float:
        """Bytes of tables that were finished between polls, by the number of files; 0 for a script."""
        count = sum(bool(_TABLE.fullmatch(name)) for name in names) - current - finished
        others = sorted(
            weight for oid, weight in self.weights.tables.items() if oid not in self._seen and oid != LARGE_OBJECTS
        )
        objects = sum(bool(_LARGE_OBJECT.fullmatch(name)) for name in names) / max(self.weights.large_objects, 1)
        return sum(others[: max(count, 0)]) + self.weights.tables.get(LARGE_OBJECTS, 0) * min(objects, 1.0)

    def _copying(self) -> dict[int, float]:
        """The tables that are being copied, and the done share of each (by rows if their number is known)."""
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
