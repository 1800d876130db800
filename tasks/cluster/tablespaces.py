"""Tablespaces of a staged copy: its recovery creates them inside its data directory, never at the path in the WAL.

The WAL record of CREATE TABLESPACE has the path of the live server's directory. A recovery would make the copy use that
directory, and would write into the live server's files. With an empty path PostgreSQL makes a plain directory in the
copy's `pg_tblspc`, an in-place tablespace. So the path is emptied in the copy's WAL while it recovers, and put back
when it has stopped.

src/backend/commands/tablespace.c: tblspc_redo, create_tablespace_directories; src/include/access/xlogrecord.h
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError, VerificationFailed
from runbook.files import inside
from runbook.files.durable import sync
from runbook.kinds import probe
from tasks.stores.directory import told
from tasks.wal.format.header import HEADER, read_header
from tasks.wal.format.names import SEGMENT, Segment
from tasks.wal.format.pages import PAGE_BYTES, PAGE_HEAD, RECORD_HEAD, SEGMENT_HEAD, places_of

LINKS = "pg_tblspc"
MOVED = ".tablespace_"
IN_PLACE = {"allow_in_place_tablespaces": "on"}
"""The setting with which a recovery accepts a plain directory there."""
_HEAD = struct.Struct("<IIQBBxxI")  # length, xid, previous record, info, resource manager, CRC
_MANAGER_AT, _TABLESPACE, _CREATE = 17, 5, 0x00
_SHORT, _LONG, _ORIGIN, _TOP_XID = 255, 254, 253, 252
_MOST_BYTES = RECORD_HEAD + 13 + 4 + 1024  # its headers, the OID, MAXPGPATH
_CRC_AT = 20


@dataclass(frozen=True)
class CreatedTablespace:
    """A CREATE TABLESPACE in WAL: the LSN of its record, the tablespace's OID, and the directory of the live server."""

    lsn: int
    oid: int
    path: str


@dataclass(frozen=True)
class _Found:
    """A record, the LSN of each of its bytes, and the offset of the path in it. The path of a hidden one begins with a
    zero byte."""

    created: CreatedTablespace
    places: list[int]
    content: bytes
    path_at: int
    is_hidden: bool


@dataclass
class _Wal:
    """Segments by number, as one timeline has them; read as they are needed."""

    files: Mapping[int, Path]
    segment_bytes: int
    _read: dict[int, bytes] = field(default_factory=dict)

    def content(self, number: int) -> bytes:
        if number not in self._read:
            for old in [one for one in self._read if abs(one - number) > 1]:
                del self._read[old]
            self._read[number] = _read_file(self.files[number]) if number in self.files else b""
        return self._read[number]

    def at(self, places: list[int]) -> bytes:
        """The bytes at these LSNs; shorter where a segment is missing."""
        numbers = {place // self.segment_bytes for place in places}
        if any(len(self.content(number)) != self.segment_bytes for number in numbers):
            return b""
        return bytes(self.content(place // self.segment_bytes)[place % self.segment_bytes] for place in places)


def find_created(directory: Path, end: int = 0) -> tuple[CreatedTablespace, ...]:
    """The tablespaces that the WAL in a directory creates, in its order. `end`: only those before this LSN.

    Raises:
        OpsError: a segment cannot be read.
    """
    found = {one.created.lsn: one.created for wal in _wals(directory) for one in _records(wal)}
    return tuple(found[lsn] for lsn in sorted(found) if not end or lsn < end)


@probe
def read_names(postgres: Postgres) -> dict[int, str]:
    """The names of a server's tablespaces by OID; empty if it does not answer."""
    try:
        with postgres.connect() as connection:
            return {int(oid): str(name) for oid, name in execute(connection, "SELECT oid, spcname FROM pg_tablespace")}
    except OpsError:
        return {}


@probe
def map_occupied(postgres: Postgres, live: Path) -> dict[str, Path]:
    """Find the tablespaces of a server whose directories are in use on this host, by that server or by an older copy:
    a base backup for the data directory `live` needs other ones, next to it. Returns these by the server's directory.

    Raises:
        Unreachable: it does not answer.
    """
    with postgres.connect() as connection:
        rows = execute(connection, "SELECT oid, pg_tablespace_location(oid) FROM pg_tablespace ORDER BY oid")
    return {str(path): _next_to(live, oid) for oid, path in rows if path and _is_used(Path(path))}


def _is_used(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except FileNotFoundError:
        return False
    except OSError:  # it is there, and cannot be read
        return True


def _next_to(live: Path, oid: object) -> Path:
    """Choose a short name: a base backup in tar format takes links of at most 100 bytes."""
    names = (f"{live.name}{MOVED}{oid}{f'_{number}' if number else ''}" for number in count())
    return next(path for path in map(live.with_name, names) if not path.exists())


@contextlib.contextmanager
def tablespaces_inside(directory: Path) -> Iterator[tuple[CreatedTablespace, ...]]:
    """While the block runs, the WAL in a copy's `pg_wal` creates tablespaces only inside the copy. Afterwards it is as
    it was: an archive or a standby may get it from there.

    Raises:
        OpsError: a segment cannot be read or changed.
    """
    found = _set_paths(directory, hidden=True)
    try:
        yield found
    finally:
        if found:
            _set_paths(directory, hidden=False)


def outside_links(data: Path) -> dict[str, Path]:
    """The directories outside a data directory in which it has tablespaces, by OID."""
    links = (data / LINKS).iterdir() if (data / LINKS).is_dir() else iter(())
    return {one.name: one.readlink() for one in sorted(links) if one.is_symlink()}


def move_out(data: Path, live: Path) -> dict[str, Path]:
    """Move the in-place tablespaces of a stopped copy next to the live data directory, and link them: base backups and
    standbys of a server refuse in-place ones. Returns their directories by OID.

    Raises:
        OpsError: a rename fails.
    """
    moved = dict[str, Path]()
    with told(data):
        for directory in sorted((data / LINKS).iterdir()):
            if directory.is_symlink() or not directory.is_dir():
                continue
            owner = directory.stat()
            target = _next_to(live, directory.name)
            directory.rename(target)
            inside.symlink(directory, str(target), (owner.st_uid, owner.st_gid))
            moved[directory.name] = target
        if moved:
            sync(data / LINKS)
            sync(live.parent)
    return moved


def delete_moved(data: Path) -> None:
    """Delete the tablespaces that `move_out` moved out of a copy which never became live. Where `data` is a link, the
    instance ran on a kept data directory, whose tablespaces stay."""
    for target in () if data.is_symlink() else outside_links(data).values():
        if MOVED in target.name and target.parent == data.parent.parent:
            shutil.rmtree(target, ignore_errors=True)


def _set_paths(directory: Path, *, hidden: bool) -> tuple[CreatedTablespace, ...]:
    changed = dict[int, CreatedTablespace]()
    for wal in _wals(directory):
        for one in _records(wal):
            if one.is_hidden == hidden or not one.created.path:
                continue
            content = bytearray(one.content)
            content[one.path_at] = 0 if hidden else ord("/")
            crc = crc32c(bytes(content[:_CRC_AT]), crc32c(bytes(content[RECORD_HEAD:]))) ^ 0xFFFFFFFF
            struct.pack_into("<I", content, _CRC_AT, crc)
            _write(wal, one.places, bytes(content))
            changed[one.created.lsn] = one.created
    return tuple(changed[lsn] for lsn in sorted(changed))


def _write(wal: _Wal, places: list[int], content: bytes) -> None:
    for number in sorted({place // wal.segment_bytes for place in places}):
        with told(wal.files[number]), inside.changing(wal.files[number]) as file:
            for place, byte in zip(places, content, strict=True):
                if place // wal.segment_bytes == number:
                    os.pwrite(file.fileno(), bytes([byte]), place % wal.segment_bytes)
            os.fsync(file.fileno())


def _wals(directory: Path) -> Iterator[_Wal]:
    """The segments of a directory, once for each timeline. Where a timeline lacks a neighbour, another one's is taken:
    a record may cross the edge of two segments, and its CRC shows whether they fit together."""
    with told(directory):
        paths = [path for path in sorted(directory.iterdir()) if SEGMENT.fullmatch(path.name)]
        if not paths:
            return
        sizes = {path: path.stat().st_size for path in paths}
    size = max(sizes.values())
    segments = [(Segment.named(path.name, size), path) for path in paths if sizes[path] == size]
    for timeline in sorted({one.timeline for one, _ in segments}):
        own = {one.number: path for one, path in segments if one.timeline == timeline}
        edges = {edge for number in own for edge in (number - 1, number + 1)}
        yield _Wal({**{one.number: path for one, path in segments if one.number in edges}, **own}, size)


def _read_file(path: Path) -> bytes:
    with told(path):
        return inside.read(path)


def _records(wal: _Wal) -> Iterator[_Found]:
    """The records of CREATE TABLESPACE. Records begin at multiples of 8, and so do the pages' contents: the byte of the
    resource manager is the second one of such a word."""
    for number in sorted(wal.files):
        content = wal.content(number)
        if len(content) != wal.segment_bytes or not _is_in_place(content, number, wal.segment_bytes):
            continue
        managers, at = content[1::8], -1
        while (at := managers.find(_TABLESPACE, at + 1)) >= 0:
            word = at * 8
            if content[word] & 0xF0 == _CREATE and content[word + 2 : word + 4] == b"\0\0":
                start = _before(number * wal.segment_bytes + word, _MANAGER_AT - 1, wal.segment_bytes)
                if start >= 0 and (found := _parse(wal, start)):
                    yield found


def _is_in_place(content: bytes, number: int, size: int) -> bool:
    """Whether it is not a recycled segment, which has older content."""
    with contextlib.suppress(VerificationFailed):
        return read_header(content[: HEADER.size], "").start == number * size
    return False


def _before(place: int, bytes_: int, size: int) -> int:
    """The LSN so many bytes of records before a place."""
    page = place - place % PAGE_BYTES
    head = PAGE_HEAD if page % size else SEGMENT_HEAD
    inside = place - page - head
    return place - bytes_ if inside >= bytes_ else page - (bytes_ - inside)


def _parse(wal: _Wal, start: int) -> _Found | None:
    head = wal.at(places_of(start, RECORD_HEAD, wal.segment_bytes))
    if len(head) < RECORD_HEAD:
        return None
    length, _, previous, _, manager, crc = _HEAD.unpack(head)
    if not RECORD_HEAD + 2 + 5 <= length <= _MOST_BYTES or previous >= start or manager != _TABLESPACE:
        return None
    places = places_of(start, length, wal.segment_bytes)
    content = wal.at(places)
    if len(content) < length or crc32c(content[:_CRC_AT], crc32c(content[RECORD_HEAD:])) ^ 0xFFFFFFFF != crc:
        return None
    at = RECORD_HEAD
    while content[at] in (_ORIGIN, _TOP_XID):
        at += 3 if content[at] == _ORIGIN else 5
    at += {_SHORT: 2, _LONG: 5}[content[at]]
    oid = struct.unpack_from("<I", content, at)[0]
    path = content[at + 4 :].rstrip(b"\0")
    hidden = path.startswith(b"\0")
    name = (b"/" + path[1:] if hidden else path).decode(errors="surrogateescape")
    return _Found(CreatedTablespace(start, oid, name), places, content, at + 4, hidden)


def crc32c(content: bytes, crc: int = 0xFFFFFFFF) -> int:
    """CRC-32C (Castagnoli) without its final inversion, continued from `crc`."""
    for byte in content:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = [_crc_of(byte) for byte in range(256)]
