"""A scratch database with a backup's schema and the rows of chosen tables. Nothing here changes the live database."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from blocks.postgres.server import Postgres, execute
from runbook import shell
from runbook.current import leaves
from runbook.errors import OTHER_BACKUPS, CommandFailed, OpsError, Unreachable, VerificationFailed
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.backups.catalogue import Backup
from tasks.postgres.content.pinned_session import pinned
from tasks.postgres.dump.checks import unchecked
from tasks.postgres.dump.compression import readable
from tasks.postgres.dump.dump import DUMP
from tasks.postgres.dump.generated import DIRECTORY, Uncomputable, emptied, load_rows, may_set_flags
from tasks.postgres.restore.staged_copy import (
    Copy,
    content_in,
    drop,
    name_beside,
    oid_of,
    staged_database,
    unpacking_in,
)
from tasks.postgres.server.properties import creation
from tasks.postgres.tables.find import FoundTable, expected_of

REPLACE_ROWS = "replace rows"
_HINT = f"{OTHER_BACKUPS}. The live tables are unchanged"


def tables_scratch_name(database: str) -> str:
    """The reserved name of the scratch database for single tables; a leftover under it is dropped."""
    return name_beside(database, "__tables")


@action(idempotent=True)
def open_schema(postgres: Postgres, backup: Backup, typed: Sequence[str] = ()) -> Copy:
    """A scratch database with a backup's pre-data section: types, functions, and the named tables, empty, with their
    dependencies. With every table if a name is not one plain table's, or if that does not restore.

    Without owners, privileges, keys and triggers: only the administrator uses it.

    Raises:
        OpsError: the backup is in another form.
        CommandFailed: its schema does not restore.
    """
    name = tables_scratch_name(postgres.database)
    if not (backup.path / DUMP).is_dir():
        raise OpsError(
            f"{backup.name} is a script, which cannot restore single tables",
            "choose a backup in directory format, or run restore-database with into=… and copy the rows by hand",
        )
    wanted = choose_entries(list_entries(postgres, backup.path / DUMP), typed) if typed else None
    if wanted is not None:
        with contextlib.suppress(CommandFailed), _listed(wanted) as chosen:
            return _open(postgres, backup, name, f"--use-list={chosen}")
    return _open(postgres, backup, name)


def _open(postgres: Postgres, backup: Backup, name: str, *what: str) -> Copy:
    with postgres.connect() as connection:
        drop(postgres, connection, name)
        leaves(staged_database(name), "the next restore-tables drops it")
        connection.execute(creation(name, content_in(backup).properties))
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name)))
        scratch = Copy(name, oid_of(connection, name))
    done = _restore(postgres, backup.path / DUMP, name, "--section=pre-data", "--no-tablespaces", *what)
    return Copy(name, scratch.oid, done.seconds)


@contextlib.contextmanager
def _listed(lines: Sequence[str]) -> Iterator[str]:
    """A file of entries for pg_restore's --use-list."""
    with tempfile.NamedTemporaryFile("w", suffix=".list", encoding="utf-8") as chosen:
        chosen.write("".join(f"{line}\n" for line in lines))
        chosen.flush()
        yield chosen.name


_ROWS = re.compile(rf"{DUMP}/(?:\d+|blob_\d+)\.dat\b.*|{DIRECTORY}/.*")


def without_rows(files: Collection[str]) -> Collection[str]:
    """The files of a backup but those of rows and large objects: what its schema needs."""
    return [name for name in files if not _ROWS.fullmatch(name)]


@probe
def row_files(postgres: Postgres, backup: Backup, scratch: Copy, tables: Sequence[FoundTable]) -> tuple[str, ...]:
    """The files of a backup that hold the rows of these tables of the scratch database.

    The directory format names them by their entry's number:
    https://github.com/postgres/postgres/blob/master/src/bin/pg_dump/pg_backup_directory.c (_ArchiveEntry).

    Raises:
        VerificationFailed: the manifest has no file for an entry.
    """
    entries, stored = _rows_in(postgres, backup, scratch, tables)
    files = {name.removeprefix(f"{DUMP}/").partition(".")[0]: name for name in backup.manifest.readable_files}
    numbers = [line.partition(";")[0] for line in entries]
    if missing := [number for number in numbers if number not in files]:
        raise VerificationFailed(f"the manifest of {backup.name} has no {DUMP}/{missing[0]}.dat", _HINT)
    return (*(files[number] for number in numbers), *(dict.fromkeys(one.file for one in stored)))


def _rows_in(
    postgres: Postgres, backup: Backup, scratch: Copy, tables: Sequence[FoundTable]
) -> tuple[list[str], tuple[Uncomputable, ...]]:
    """The dump's entries of these tables' rows, and the generated columns of tables whose rows are in files alongside
    the dump instead."""
    wanted = tuple(f"TABLE DATA {start}" for start in _entries(postgres, scratch, tables))
    listed = list_entries(postgres, backup.path / DUMP)
    entries = [entry.line for entry in listed if entry.what.startswith(wanted)]
    known = content_in(backup).uncomputable if may_set_flags(postgres) else ()
    stored = tuple(one for one in known if any(f" {one.oid} TABLE DATA " in line for line in entries))
    return [line for line in entries if not any(f" {one.oid} TABLE DATA " in line for one in stored)], stored


@action(of=lambda tables: [Act(REPLACE_ROWS, table.name) for table in tables])
def fill_tables(
    postgres: Postgres,
    backup: Backup,
    scratch: Copy,
    tables: Sequence[FoundTable],
    jobs: int,
    accepted: Collection[str] = (),
) -> Copy:
    """Restore the rows of these tables only into the scratch database. `accepted`: generated columns that stay empty
    unless the backup has their values."""

    def restored() -> WorkDone:
        return fill_progress(postgres, backup, scratch, tables)

    entries, stored = _rows_in(postgres, backup, scratch, tables)
    fragile = {(schema, table) for schema, table, _ in content_in(backup).volatile_checks}
    with (
        _listed(entries) as chosen,
        unchecked(postgres, scratch.database, fragile),
        emptied(postgres, scratch.database, accepted),
        progress(restored),
    ):
        workers = max(1, min(jobs, len(entries)))  # more would only sort the whole dump's dependencies
        numbers = {line.partition(";")[0] for line in entries}
        text_bytes = content_in(backup).text_bytes
        with readable(postgres, backup.path / DUMP, unpacking_in(backup), workers, text_bytes, numbers) as dump:
            done = _restore(postgres, dump, scratch.database, f"--use-list={chosen}", f"--jobs={workers}")
        load_rows(postgres, backup.path, scratch.database, stored)
    return Copy(scratch.database, scratch.oid, done.seconds)


def fill_progress(postgres: Postgres, backup: Backup, scratch: Copy, tables: Sequence[FoundTable]) -> WorkDone:
    """The tables' bytes in the scratch database (without indexes) against their size at the backup.

    An estimate: dead rows at the backup are not restored.

    Raises:
        Unreachable, OpsError: the sizes cannot be read now.
    """
    sums = content_in(backup).tables
    whole = sum(expected_of(table, sums).bytes for table in tables)
    try:
        with postgres.connect(scratch.database) as connection:
            execute(connection, "SET lock_timeout = '1s'")
            now = int(execute(connection, _FILLED, [table.oid for table in tables])[0][0])
    except psycopg.Error as error:
        raise Unreachable(f"the sizes of the tables cannot be read: {type(error).__name__}") from None
    return WorkDone(f"{scratch.database}: {size(now)} of about {size(whole)} restored", now / max(whole, now, 1))


_FILLED = """
SELECT coalesce(sum(pg_table_size(coalesce(t.relid::oid, chosen))), 0)
FROM unnest(%s::oid[]) AS chosen LEFT JOIN LATERAL pg_partition_tree(chosen::regclass) t ON true
"""


def _entries(postgres: Postgres, scratch: Copy, tables: Sequence[FoundTable]) -> tuple[str, ...]:
    """The starts of their entries in the dump's table of contents, before the owner's name.

    Another table with the same start may be included, which does no harm here.
    """
    with pinned(postgres, scratch.database) as connection:
        rows = execute(connection, _LEAVES, [table.oid for table in tables])
    return tuple(" ".join(f"{schema} {name} ".splitlines()) for schema, name in rows)


_LEAVES = """
SELECT n.nspname, c.relname
FROM unnest(%s::oid[]) AS chosen LEFT JOIN LATERAL pg_partition_tree(chosen::regclass) t ON true
JOIN pg_class c ON c.oid = coalesce(t.relid::oid, chosen) JOIN pg_namespace n ON n.oid = c.relnamespace
"""


def _restore(postgres: Postgres, dump: Path, database: str, *what: str) -> shell.Completed:
    argv = [
        *(postgres.program("pg_restore"), "--format=directory", "--exit-on-error", "--no-password"),
        *("--no-owner", "--no-privileges", *what, "--dbname", database, str(dump)),
    ]
    environment = postgres.environment(options="-c synchronous_commit=off")
    return shell.run(argv, environment=environment, stall=postgres.stall(database), hint=_HINT)


@action
def drop_tables_scratch(postgres: Postgres) -> str:
    """Drop the scratch database."""
    name = tables_scratch_name(postgres.database)
    with postgres.connect() as connection:
        drop(postgres, connection, name)
    return name


_ENTRY = re.compile(r"(\d+); \d+ \d+ (.+)")
_NEEDS = re.compile(r";\s+depends on: ([\d ]+)")
_PLAIN = re.compile(r"(?:([a-z_][a-z0-9_$]*)\.)?([a-z_][a-z0-9_$]*)")
# Kinds of entries that belong to tables, or come after the rows. Everything else (types, functions …) is restored.
_OF_TABLES = (
    *("TABLE ", "VIEW ", "MATERIALIZED VIEW ", "FOREIGN TABLE ", "SEQUENCE ", "DEFAULT ", "COMMENT ", "ACL "),
    *("SECURITY LABEL ", "STATISTICS ", "RULE ", "CONSTRAINT ", "CHECK CONSTRAINT ", "FK CONSTRAINT ", "INDEX "),
    *("TRIGGER ", "EVENT TRIGGER ", "POLICY ", "ROW SECURITY ", "PUBLICATION ", "SUBSCRIPTION "),
)
_ATTACH, _DEFAULT = "TABLE ATTACH ", "DEFAULT "


@dataclass(frozen=True)
class TocEntry:
    """One line of the list: its number, `what` (kind, schema, name, owner), and the numbers that it depends on."""

    number: int
    what: str
    line: str
    needs: frozenset[int]


def list_entries(postgres: Postgres, dump: Path) -> tuple[TocEntry, ...]:
    """A dump's table of contents, in order. The last one is kept: a run reads it three times."""
    toc = (dump / "toc.dat").stat()
    return _listed_by(postgres.program("pg_restore"), dump, (toc.st_ino, toc.st_mtime_ns, toc.st_size))


@functools.lru_cache(maxsize=1)
def _listed_by(program: Path, dump: Path, toc: tuple[int, ...]) -> tuple[TocEntry, ...]:
    """`toc`: what the table of contents is, while it is unchanged."""
    listed = shell.run([program, "--list", "--verbose", dump]).stdout
    found = list[TocEntry]()
    for line in listed.splitlines():
        if match := _ENTRY.match(line):
            found.append(TocEntry(int(match[1]), match[2], line, frozenset()))
        elif found and (match := _NEEDS.match(line)):
            last = found[-1]
            found[-1] = TocEntry(last.number, last.what, last.line, frozenset(map(int, match[1].split())))
    return tuple(found)


def choose_entries(entries: Sequence[TocEntry], typed: Sequence[str]) -> list[str] | None:
    """The lines that the named tables need, with their partitions.

    None if a name is not one plain table's: then the whole schema must be restored to resolve it.
    """
    numbers = {entry.number: entry for entry in entries}
    chosen = set[int]()
    for name in typed:
        found = _tables_of(entries, name.strip())
        if len(found) != 1:
            return None
        chosen.update(found)
    chosen |= {entry.number for entry in entries if not _is_of_tables(entry.what)}
    while added := _needed(entries, numbers, chosen):
        chosen |= added
    return [entry.line for entry in entries if entry.number in chosen]


def _tables_of(entries: Sequence[TocEntry], typed: str) -> list[int]:
    if not (match := _PLAIN.fullmatch(typed)):
        return []
    found = []
    for entry in entries:
        words = entry.what.split(" ")
        if len(words) == 4 and words[0] == "TABLE" and words[2] == match[2] and match[1] in (None, words[1]):
            found.append(entry.number)
    return found


def _is_of_tables(what: str) -> bool:
    return what.startswith(_OF_TABLES) and not what.startswith("DEFAULT ACL ")


def _needed(entries: Sequence[TocEntry], numbers: dict[int, TocEntry], chosen: set[int]) -> set[int]:
    """Entries that the chosen ones need and that are not chosen yet: dependencies, defaults, and partitions with their
    attachment."""
    needed = {number for one in chosen if one in numbers for number in numbers[one].needs}
    tables = {number for number in chosen if number in numbers and _is_of_tables(numbers[number].what)}
    for entry in entries:
        if entry.what.startswith((_ATTACH, _DEFAULT)) and _is_of_tables(entry.what) and entry.needs & tables:
            needed |= {entry.number, *entry.needs}
    return (needed & numbers.keys()) - chosen
