"""One record of WAL, byte by byte: the row that it wrote, which pg_waldump does not print.

src/include/access/xlogrecord.h; src/backend/access/transam/xlogreader.c: DecodeXLogRecord
"""

from __future__ import annotations

import struct

from runbook.files import inside
from tasks.wal.format.pages import PAGE_BYTES, PAGE_HEAD, RECORD_HEAD, SEGMENT_HEAD, Files

_BLOCK, _IMAGE = struct.Struct("<BBH"), struct.Struct("<HHB")
_HAS_IMAGE, _HAS_DATA, _SAME_RELATION = 0x10, 0x20, 0x80
_HAS_HOLE, _COMPRESSED = 0x01, 0x1C
_RELATION_BYTES, _NUMBER_BYTES = 12, 4
_SHORT_MAIN, _LONG_MAIN = 255, 254


def read_record(files: Files, start: int) -> bytes:
    """The record at `start`, without the headers of the pages that it continues on.

    Raises:
        StopIteration, struct.error: it is not in these segments.
    """
    found, place, length = bytearray(), start, RECORD_HEAD
    while len(found) < length:
        segment, path = next(one for one in files if one[0].start <= place < one[0].end)
        with inside.reading(path) as file:
            file.seek(place - segment.start)
            found += file.read(min(PAGE_BYTES - place % PAGE_BYTES, length - len(found)))
        if length == RECORD_HEAD:
            (length,) = struct.unpack_from("<I", found)
            place = start + len(found)
        else:
            place = (place // PAGE_BYTES + 1) * PAGE_BYTES
        if place % PAGE_BYTES == 0:
            place += PAGE_HEAD if place % segment.bytes else SEGMENT_HEAD
    return bytes(found)


def row_in(record: bytes, off: int) -> bytes | None:
    """The row at the line pointer `off` of a record's first block, without its header, as an in-place update left it.
    None: only a compressed image of the page has it."""
    _, flags, data_bytes = _BLOCK.unpack_from(record, RECORD_HEAD)
    place, image_bytes, hole, information = RECORD_HEAD + _BLOCK.size, 0, 0, 0
    if flags & _HAS_IMAGE:
        image_bytes, hole, information = _IMAGE.unpack_from(record, place)
        place += _IMAGE.size
        if information & _COMPRESSED:
            return None
    place += (0 if flags & _SAME_RELATION else _RELATION_BYTES) + _NUMBER_BYTES
    if record[place] == _SHORT_MAIN:
        place += 2
    elif record[place] == _LONG_MAIN:
        place += 5
    if flags & _HAS_DATA:
        return record[place + image_bytes : place + image_bytes + data_bytes]
    image = record[place : place + image_bytes]
    missing = PAGE_BYTES - image_bytes if information & _HAS_HOLE else 0
    page = image[:hole] + bytes(missing) + image[hole:]
    (item,) = struct.unpack_from("<I", page, PAGE_HEAD + 4 * (off - 1))
    row = page[item & 0x7FFF : (item & 0x7FFF) + (item >> 17)]
    return row[row[22] :]
