"""The databases that restores replaced: kept under another name, with a label in their comment, until deleted."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from blocks.postgres.server import Connection, Postgres, execute
from runbook.kinds import probe
from tasks.postgres.restore.staged_copy import name_beside

UNDONE = "undo-restore"
"""Instead of a backup's name, in the label of a database that an undo replaced."""
KEPT = re.compile(r"__old_\d{8}_\d{6}$")


@dataclass(frozen=True)
class SupersededDatabase:
    """A database that a restore replaced. `writes`: pg_stat_database's count of the new live one at the swap, and `lsn`
    the position in WAL (0: not known)."""

    name: str
    bytes: int
    since: str
    backup: str
    writes: int
    comment: str
    lsn: int = 0


def writes_of(connection: Connection, database: str) -> int:
    """Rows written in a database since its statistics were reset."""
    rows = execute(
        connection, "SELECT tup_inserted + tup_updated + tup_deleted FROM pg_stat_database WHERE datname = %s", database
    )
    return int(rows[0][0]) if rows else 0


@probe
def read_writes(postgres: Postgres, database: str) -> int:
    """See `writes_of`."""
    with postgres.connect() as connection:
        return writes_of(connection, database)


@probe
def find_superseded(postgres: Postgres) -> tuple[SupersededDatabase, ...]:
    """The databases that restores replaced, newest first."""
    base = name_beside(postgres.database, "__old_00000000_000000").removesuffix("__old_00000000_000000")
    with postgres.connect() as connection:
        rows = execute(
            connection,
            "SELECT datname, pg_database_size(oid), coalesce(shobj_description(oid, 'pg_database'), '') "
            "FROM pg_database WHERE starts_with(datname, %s) ORDER BY right(datname, 15) DESC",
            base + "__old_",
        )
    return tuple(_superseded(*row) for row in rows if KEPT.search(str(row[0])))


@probe
def read_swap(postgres: Postgres) -> int:
    """The transaction that swapped the live database with a kept one.

    0 if unknown: the kept database was deleted, or one of the two was altered since.
    """
    return _swap(postgres)[0]


@probe
def read_named(postgres: Postgres) -> int:
    """The LSN at which a restore gave the live database its name.

    0 if unknown: see `read_swap`; or an undo gave it back.
    """
    _, old = _swap(postgres)
    return old.lsn if old and old.backup != UNDONE else 0


def _swap(postgres: Postgres) -> tuple[int, SupersededDatabase | None]:
    found = {old.name: old for old in find_superseded.work(postgres)}
    with postgres.connect() as connection:
        rows = execute(
            connection,
            "SELECT live.xmin::text::bigint, kept.datname FROM pg_database live JOIN pg_database kept "
            "ON kept.xmin::text = live.xmin::text WHERE live.datname = %s AND kept.datname = ANY (%s)",
            postgres.database,
            list(found),
        )
    return (int(rows[0][0]), found[str(rows[0][1])]) if rows else (0, None)


def _superseded(name: str, size: int, label: str) -> SupersededDatabase:
    try:
        note = json.loads(label)
        writes, lsn = int(note["writes"]), int(note.get("lsn", 0))
        return SupersededDatabase(name, size, note["superseded"], note["by"], writes, note["comment"], lsn)
    except (ValueError, KeyError, TypeError):
        return SupersededDatabase(name, size, "unknown", "unknown", -1, label)
