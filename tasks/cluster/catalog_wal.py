"""A copy of WAL in which only the records of some databases have an effect: recovery rebuilds only their catalogs.

A record of another database becomes an XLOG_NOOP of the same length in the same place. Without that, recovery would
write the other databases' pages, and would create or remove the directories of the live cluster's tablespaces.

src/include/access/xlogrecord.h, src/include/access/rmgrlist.h, src/backend/access/transam/xlogreader.c
"""

from __future__ import annotations

import functools
import mmap
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from runbook.errors import OpsError
from runbook.files import inside
from tasks.wal.format.names import Segment
from tasks.wal.format.pages import PAGE_BYTES, PAGE_HEAD, SEGMENT_HEAD, places_of, record_end

_HEAD = struct.Struct("<IIQBBxxI")  # length, xid, previous record, info, resource manager, CRC
_CHANGED, _CHANGED_AT, _PARSED_BYTES = struct.Struct("<BBxxI"), 16, 72  # info, resource manager, CRC
_LOCATOR = struct.Struct("<II")  # tablespace, database
_PAGE = struct.Struct("<HHIQ")
_XLOG, _STORAGE, _DATABASE, _TABLESPACE, _RELATION_MAP, _FIRST_CUSTOM = 0, 2, 4, 5, 7, 128
# Transactions, CLOG, multixacts, standby, commit times, replication origins, messages: of the whole cluster.
_OF_CLUSTER = frozenset({1, 3, 6, 8, 18, 19, 21})
_NOOP, _SWITCH, _FULL_PAGES = 0x20, 0x40, (0xA0, 0xB0)
_SHORT, _LONG, _ORIGIN, _TOP_XID, _MOST_BLOCKS = 255, 254, 253, 252, 32
_HAS_IMAGE, _HAS_HOLE, _COMPRESSED = 0x10, 0x01, 0x1C
_TRUNCATE = 0x20
_CLOCK_MASK = 0xFFF  # the clock is read once per 4,096 records

_IN_PAGE = PAGE_BYTES - 1

Buffers = Mapping[int, mmap.mmap]
_Bytes = mmap.mmap | bytes
# Its place after a page's header, length, info, resource manager, CRC; the buffer and the offset to read it from.
_Record = tuple[int, int, int, int, int, _Bytes, int]


def keep_databases(
    files: Sequence[tuple[Segment, Path]], start: int, kept: frozenset[int], *, seconds: float
) -> tuple[int, int]:
    """Change the segments in place, from the record at LSN `start` on: keep the records of the databases `kept` (OIDs)
    and of the whole cluster. Clear what follows the last record.

    Returns the LSN at which WAL ends, and how many records no longer have an effect.

    Raises:
        OpsError: it takes more than `seconds`, or a file cannot be changed.
    """
    buffers, size, limit = dict[int, mmap.mmap](), files[0][0].bytes, time.monotonic() + seconds
    kept, place, before, count, silenced = kept | {0}, start, 0, 0, 0
    with ExitStack() as opened:
        for segment, path in files:
            file = opened.enter_context(inside.changing(path))
            buffers[segment.number] = opened.enter_context(mmap.mmap(file.fileno(), 0))
        while found := _record(buffers, size, place, before):
            before, length, info, manager, crc, buffer, at = found
            if not _stays(buffer, at, info, manager, kept):
                _silence(buffers, size, before, info, manager, crc)
                silenced += 1
            room = PAGE_BYTES - (before & _IN_PAGE)
            if manager == _XLOG and info & 0xF0 == _SWITCH:
                place = (before // size + 1) * size
            else:
                place = before + (length + 7 & ~7) if length <= room else record_end(before, length, size)
            count += 1
            if not count & _CLOCK_MASK and time.monotonic() > limit:
                raise OpsError(f"its WAL since the last checkpoint could not be read within {seconds:.0f} s")
        _clear(buffers, size, place)
    return place, silenced


def _record(buffers: Buffers, size: int, place: int, before: int) -> _Record | None:
    """The record at a place; None where WAL ends."""
    if not place & _IN_PAGE:
        buffer = buffers.get(place // size)
        if buffer is None or _PAGE.unpack_from(buffer, place % size)[3] != place:
            return None
        place += PAGE_HEAD if place % size else SEGMENT_HEAD
    buffer = buffers.get(place // size)
    if buffer is None:
        return None
    found: _Bytes = buffer
    at = place % size
    if place & _IN_PAGE > PAGE_BYTES - _PARSED_BYTES:  # its head may cross a page boundary
        found, at = _read(buffers, size, place), 0
        if len(found) < _HEAD.size:
            return None
    length, _, previous, info, manager, crc = _HEAD.unpack_from(found, at)
    if length < _HEAD.size or (before and previous != before):  # after the end there are zeros or older records
        return None
    return place, length, info, manager, crc, found, at


def _read(buffers: Buffers, size: int, place: int) -> bytes:
    places = places_of(place, _PARSED_BYTES, size)
    return bytes(buffers[one // size][one % size] for one in places if one // size in buffers)


def _stays(buffer: _Bytes, at: int, info: int, manager: int, kept: frozenset[int]) -> bool:
    if manager in _OF_CLUSTER or (manager == _XLOG and info & 0xF0 not in _FULL_PAGES):
        return True
    if manager in (_DATABASE, _TABLESPACE) or manager >= _FIRST_CUSTOM:
        return False
    at += _HEAD.size
    if manager in (_STORAGE, _RELATION_MAP):
        return _database_of_data(buffer, at, info, manager) in kept
    return buffer[at] <= _MOST_BLOCKS and _database_of_block(buffer, at) in kept


def _database_of_block(buffer: _Bytes, at: int) -> int:
    """Of a record's first block: DecodeXLogRecord."""
    flags = buffer[at + 1]
    at += 4
    if flags & _HAS_IMAGE:
        image = buffer[at + 4]
        at += 7 if image & _HAS_HOLE and image & _COMPRESSED else 5
    return int(_LOCATOR.unpack_from(buffer, at)[1])


def _database_of_data(buffer: _Bytes, at: int, info: int, manager: int) -> int:
    """Of a record without blocks: xl_smgr_create, xl_smgr_truncate, xl_relmap_update."""
    while (kind := buffer[at]) in (_ORIGIN, _TOP_XID):
        at += 3 if kind == _ORIGIN else 5
    at += {_SHORT: 2, _LONG: 5}.get(kind, 0)
    if manager == _RELATION_MAP:
        return int(_LOCATOR.unpack_from(buffer, at)[0])
    return int(_LOCATOR.unpack_from(buffer, at + 4 * (info & 0xF0 == _TRUNCATE))[1])


def _silence(buffers: Buffers, size: int, place: int, info: int, manager: int, crc: int) -> None:
    changed = _NOOP, _XLOG, crc ^ _crc_change(info ^ _NOOP, manager ^ _XLOG)
    if place & _IN_PAGE <= PAGE_BYTES - _HEAD.size:
        _CHANGED.pack_into(buffers[place // size], place % size + _CHANGED_AT, *changed)
        return
    for one, byte in zip(places_of(place, _HEAD.size, size)[_CHANGED_AT:], _CHANGED.pack(*changed), strict=True):
        buffers[one // size][one % size] = byte


@functools.cache
def _crc_change(info: int, manager: int) -> int:
    """How CRC-32C changes with these bits of a record's head, independent of its other bytes: the code is linear, and
    only two padding bytes follow (XLogRecordAssemble)."""
    crc = 0
    for byte in (info, manager, 0, 0):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _clear(buffers: Buffers, size: int, place: int) -> None:
    """Clear the rest of a page: there WAL ends for the server too."""
    buffer, at = buffers.get(place // size), place % size
    if buffer is not None:
        end = (at // PAGE_BYTES + 1) * PAGE_BYTES
        buffer[at:end] = bytes(end - at)
