"""The pages of WAL segments: whether records follow a place at which reading failed.

src/include/access/xlog_internal.h: XLogPageHeaderData; src/include/access/xlogrecord.h: XLogRecord
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from runbook.files import inside
from tasks.wal.format.names import Segment

PAGE_BYTES, PAGE_HEAD, SEGMENT_HEAD, RECORD_HEAD, ALIGNED = 8192, 24, 40, 24, 8
_PAGE = struct.Struct("<HHIQI")
_CONTINUED, _LONG = 0x0001, 0x0002
_SWITCH_INFO, _XLOG_MANAGER = 0x40, 0

Files = Sequence[tuple[Segment, Path]]


def record_end(start: int, bytes_: int, segment_bytes: int) -> int:
    """Where the record after one of `length` bytes begins: every page that it continues on has a header.

    src/backend/access/transam/xlogreader.c: XLogDecodeNextRecord
    """
    place, left = start, bytes_
    while left > (room := PAGE_BYTES - place % PAGE_BYTES):
        place, left = place + room, left - room
        place += PAGE_HEAD if place % segment_bytes else SEGMENT_HEAD
    return -(-(place + left) // ALIGNED) * ALIGNED


def places_of(start: int, bytes_: int, segment_bytes: int) -> list[int]:
    """The LSN of each byte of a record, or of its beginning: page headers lie between them."""
    found, place = list[int](), start
    for _ in range(bytes_):
        if found and not place % PAGE_BYTES:
            place += PAGE_HEAD if place % segment_bytes else SEGMENT_HEAD
        found.append(place)
        place += 1
    return found


def next_record(files: Files, last: int) -> int:
    """Where the record after the last readable one begins; `last` itself at the beginning of a segment."""
    segment, path = next(one for one in files if one[0].start <= last < one[0].end)
    if last == segment.start:
        return last
    with inside.reading(path) as file:
        length, info, manager = _head(file, last - segment.start)
    if manager == _XLOG_MANAGER and info & 0xF0 == _SWITCH_INFO:
        return segment.end
    return record_end(last, length, segment.bytes)


def _head(file: BinaryIO, offset: int) -> tuple[int, int, int]:
    """A record's length, info and resource manager. Its head may cross a page boundary."""
    file.seek(offset)
    length = struct.unpack("<I", file.read(4))[0]
    info = offset + 16
    if offset % PAGE_BYTES + 16 >= PAGE_BYTES:
        info += PAGE_HEAD
    file.seek(info)
    found = file.read(2)
    return length, *(found if len(found) == 2 else (0, 255))


def record_behind(files: Files, begin: int) -> int:
    """Where reading can continue after the unreadable record at `begin`; 0 for nowhere. On the page of `begin` that is
    the record whose header names `begin` as the previous one; on a later page, any record that begins there. Where WAL
    simply ends, only the rest of the record at `begin` may exist; what follows is empty, or older than its place."""
    first = (begin // PAGE_BYTES + 1) * PAGE_BYTES
    for segment, path in files:
        if segment.end <= begin:
            continue
        with inside.reading(path) as file:
            if segment.start <= begin and (found := _successor(file, segment, begin)):
                return found
            for at in range(max(segment.start, first), segment.end, PAGE_BYTES):
                file.seek(at - segment.start)
                if _begins(file.read(PAGE_BYTES), at):
                    return at
    return 0


def skip_to(path: Path, segment: Segment, record: int) -> None:
    """Make a page of a copy begin with the rest of a record, up to `record`: pg_waldump searches for the first record
    of a page, and finds that one."""
    page = record // PAGE_BYTES * PAGE_BYTES
    with inside.changing(path) as file:
        file.seek(page - segment.start)
        magic, info, timeline, address, _ = _PAGE.unpack(file.read(_PAGE.size))
        rest = record - page - (SEGMENT_HEAD if info & _LONG else PAGE_HEAD)
        file.seek(page - segment.start)
        file.write(_PAGE.pack(magic, info | _CONTINUED, timeline, address, rest))


def _successor(file: BinaryIO, segment: Segment, begin: int) -> int:
    """The record after `begin` on the same page, independent of the damaged one's length."""
    if begin % PAGE_BYTES == 0:  # the record follows the page's header
        begin += PAGE_HEAD if begin % segment.bytes else SEGMENT_HEAD
    file.seek(begin - segment.start)
    left = file.read(PAGE_BYTES - begin % PAGE_BYTES)
    wanted, place = struct.pack("<Q", begin), RECORD_HEAD
    while (place := left.find(wanted, place + 1)) >= 0:
        record = place - ALIGNED  # xl_prev follows the record's length and transaction
        if record % ALIGNED == 0 and struct.unpack_from("<I", left, record)[0] >= RECORD_HEAD:
            return begin + record
    return 0


def _begins(page: bytes, at: int) -> bool:
    if len(page) < PAGE_BYTES:
        return False
    magic, info, _, address, rest = _PAGE.unpack_from(page)
    if not magic & 0xD000 or address != at:
        return False
    place = (SEGMENT_HEAD if info & _LONG else PAGE_HEAD) + (rest if info & _CONTINUED else 0)
    place = -(-place // ALIGNED) * ALIGNED
    return place + 4 <= PAGE_BYTES and page[place : place + 4] != bytes(4)
