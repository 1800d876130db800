"""The pages of WAL segments: whether records follow a place from which nothing more can be read.

src/include/access/xlog_internal.h: XLogPageHeaderData; src/include/access/xlogrecord.h: XLogRecord
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tasks.wal.names import Segment

PAGE_BYTES, PAGE_HEAD, SEGMENT_HEAD, ALIGNED = 8192, 24, 40, 8
_PAGE = struct.Struct("<HHIQI")
_CONTINUED, _LONG = 0x0001, 0x0002
_SWITCH_INFO, _XLOG_MANAGER = 0x40, 0

Files = Sequence[tuple[Segment, Path]]


def record_end(start: int, bytes_: int, segment_bytes: int) -> int:
    """Where the record after one of so many bytes begins: every page that it goes on in has a header of its own.

    src/backend/access/transam/xlogreader.c: XLogDecodeNextRecord
    """
    place, left = start, bytes_
    while left > (room := PAGE_BYTES - place % PAGE_BYTES):
        place, left = place + room, left - room
        place += PAGE_HEAD if place % segment_bytes else SEGMENT_HEAD
    return -(-(place + left) // ALIGNED) * ALIGNED


def next_record(files: Files, last: int) -> int:
    """Where the record after the last one that could be read begins; `last` itself, where that is a segment's begin."""
    segment, path = next(one for one in files if one[0].start <= last < one[0].end)
    if last == segment.start:
        return last
    with path.open("rb") as file:
        length, info, manager = _head(file, last - segment.start)
    if manager == _XLOG_MANAGER and info & 0xF0 == _SWITCH_INFO:
        return segment.end
    return record_end(last, length, segment.bytes)


def _head(file: BinaryIO, offset: int) -> tuple[int, int, int]:
    """A record's length, info and resource manager. Its head may go over the edge of a page."""
    file.seek(offset)
    length = struct.unpack("<I", file.read(4))[0]
    info = offset + 16
    if offset % PAGE_BYTES + 16 >= PAGE_BYTES:
        info += PAGE_HEAD
    file.seek(info)
    found = file.read(2)
    return length, *(found if len(found) == 2 else (0, 255))


def records_follow(files: Files, begin: int) -> bool:
    """Whether a record begins on a page after the one of `begin`. Where WAL just ends, only the rest of the record at
    `begin` may be there; what is behind that is empty, or older than its place."""
    first = (begin // PAGE_BYTES + 1) * PAGE_BYTES
    for segment, path in files:
        if segment.end <= first:
            continue
        with path.open("rb") as file:
            for at in range(max(segment.start, first), segment.end, PAGE_BYTES):
                file.seek(at - segment.start)
                if _begins(file.read(PAGE_BYTES), at):
                    return True
    return False


def _begins(page: bytes, at: int) -> bool:
    if len(page) < PAGE_BYTES:
        return False
    magic, info, _, address, rest = _PAGE.unpack_from(page)
    if not magic & 0xD000 or address != at:
        return False
    place = (SEGMENT_HEAD if info & _LONG else PAGE_HEAD) + (rest if info & _CONTINUED else 0)
    place = -(-place // ALIGNED) * ALIGNED
    return place + 4 <= PAGE_BYTES and page[place : place + 4] != bytes(4)
