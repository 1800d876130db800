"""The first bytes of a WAL segment: whose it is, and which.

src/include/access/xlog_internal.h: XLogPageHeaderData, XLogLongPageHeaderData
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from runbook.errors import VerificationFailed
from tasks.wal.format.names import Segment

HEADER = struct.Struct("<HHIQI4xQII")
_LONG = 0x0002
_HINT = "do not replay it; look for another copy of this segment (the receiver's directory, the second store)"


@dataclass(frozen=True)
class Header:
    """The system identifier of the cluster that wrote it, the timeline of its first page, its LSN, its size."""

    system: int
    timeline: int
    start: int
    segment_bytes: int


def read_header(content: bytes, name: str) -> Header:
    """Of a segment's content, or its beginning.

    Raises:
        VerificationFailed: it does not begin as a segment does.
    """
    try:
        magic, info, timeline, start, _, system, size, page = HEADER.unpack_from(content)
    except struct.error:
        raise VerificationFailed(f"{name} is too short to be a WAL segment", _HINT) from None
    if not magic & 0xD000 or not info & _LONG or not page or size & (size - 1) or size < 1 << 20:
        raise VerificationFailed(f"{name} does not begin as a WAL segment does", _HINT)
    return Header(system, timeline, start, size)


def require_own(content: bytes, segment: Segment, system: int) -> None:
    """That a segment's content is what its name says, of the cluster `system`. A segment in which a timeline begins has
    pages of the one before.

    Raises:
        VerificationFailed: it is another cluster's, another segment, or not whole.
    """
    found = read_header(content, segment.name)
    if found.system != system:
        told = f"{segment.name} is of another cluster: its system identifier is {found.system}, not {system}"
        raise VerificationFailed(told, _HINT)
    if found.start != segment.start or found.timeline > segment.timeline or found.segment_bytes != segment.bytes:
        raise VerificationFailed(f"{segment.name} holds another segment of the same cluster", _HINT)
    if len(content) != segment.bytes:
        raise VerificationFailed(f"{segment.name} has {len(content)} bytes instead of {segment.bytes}", _HINT)
