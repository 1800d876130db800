"""The catalog of a base backup, read from its files: a table's OID and file, without a server.

Only the fixed-width columns of pg_class are read, which come first in every row. The file also has rows that were
updated or deleted and not yet vacuumed: they name the files that a table had before.
https://www.postgresql.org/docs/current/storage-page-layout.html
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from runbook.errors import VerificationFailed
from runbook.files import inside
from tasks.cluster.unpack import extract
from tasks.postgres.tables.filenodes import FiledRelation

PG_DATABASE, PG_CLASS = "1262", "1259"
_MAP, _MAP_MAGIC = "pg_filenode.map", 0x592717
_PAGE, _HEAD = 8192, 24
_NAME = 64
# pg_class: oid, relname, relnamespace, reltype, reloftype, relowner, relam, relfilenode
_CLASS = struct.Struct("<I64sIIIIII")
_DATABASE = struct.Struct("<I64s")
_SYSTEM_SCHEMAS = (11, 99)  # pg_catalog, pg_toast
_PUBLIC = 2200


def find_in_backup(backup: Path, database: str, typed: str, directory: Path, where: str) -> tuple[FiledRelation, ...]:
    """The tables of that name in a fetched full base backup. Schemas other than public cannot be distinguished here, so
    any of them matches.

    Raises:
        VerificationFailed: the backup cannot be read.
        OpsError: the cause is this host.
    """
    try:
        extract(backup, directory, re.compile(rf"(global|base/\d+)/{_MAP}").fullmatch)
        databases = directory / "global" / _file_in(directory / "global", PG_DATABASE)
        classes = {path: path / _file_in(path, PG_CLASS) for path in sorted((directory / "base").iterdir())}
        files = {path.relative_to(directory).as_posix() for path in (databases, *classes.values())}
        extract(backup, directory, files.__contains__)
    except VerificationFailed as error:
        what = f"the catalog of {where} cannot be read: {error.message}"
        raise VerificationFailed(what, "give the table's OID") from None
    schema, _, name = typed.strip().replace('"', "").rpartition(".")
    found = dict[tuple[int, int, int], FiledRelation]()
    for oid in _databases(databases, database):
        path = classes.get(directory / "base" / str(oid))
        for row in rows_in(inside.read(path)) if path else ():
            if len(row) < _CLASS.size:
                continue
            table, called, namespace, *_, file = _CLASS.unpack_from(row)
            fits = not schema or (namespace == _PUBLIC) == (schema == "public")
            if fits and file and _text(called) == name and namespace not in _SYSTEM_SCHEMAS:
                found[oid, table, file] = FiledRelation(oid, table, typed, file, 0, where)
    return tuple(found.values())


def _file_in(directory: Path, oid: str) -> str:
    """The file of a mapped catalog, which its rows do not contain: VACUUM FULL changes it.

    src/backend/utils/cache/relmapper.c: RelMapFile
    """
    content = inside.read(directory / _MAP)
    magic, count = struct.unpack_from("<ii", content)
    if magic == _MAP_MAGIC:
        for index in range(count):
            mapped, file = struct.unpack_from("<II", content, 8 + 8 * index)
            if mapped == int(oid):
                return str(file)
    return oid


def databases_in(data: Path, wanted: str) -> set[int]:
    """The present and former OIDs of the databases of that name, from the files of a data directory.

    Raises:
        OSError: they cannot be read.
    """
    shared = data / "global"
    return _databases(shared / _file_in(shared, PG_DATABASE), wanted)


def has_database(data: Path, wanted: str) -> bool:
    """Return True if a stopped server's data directory has the files of a database of that name.

    Raises:
        OSError: they cannot be read.
    """
    places = [data / "base", *data.glob("pg_tblspc/*/PG_*")]
    return any((place / str(oid)).is_dir() for oid in databases_in(data, wanted) for place in places)


def _databases(path: Path, wanted: str) -> set[int]:
    """The present and former OIDs of the databases of that name."""
    rows = (_DATABASE.unpack_from(row) for row in rows_in(inside.read(path)) if len(row) >= _DATABASE.size)
    return {oid for oid, name in rows if _text(name) == wanted}


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode(errors="replace")


def rows_in(content: bytes) -> Iterator[bytes]:
    """The rows of a heap file without their headers, dead ones included."""
    for page in range(0, len(content) - _PAGE + 1, _PAGE):
        (lower,) = struct.unpack_from("<H", content, page + 12)
        for at in range(page + _HEAD, page + min(lower, _PAGE), 4):
            (item,) = struct.unpack_from("<I", content, at)
            offset, state, length = item & 0x7FFF, item >> 15 & 3, item >> 17
            if state == 1 and length > _HEAD and offset + length <= _PAGE:  # 1: it has a row
                row = content[page + offset : page + offset + length]
                yield row[row[22] :]
