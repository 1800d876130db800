"""The header of a WAL segment: its cluster and its place.

src/include/access/xlog_internal.h: XLogPageHeaderData, XLogLongPageHeaderData
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from runbook.errors import VerificationFailed
from tasks.wal.format.names import MOST_SEGMENT_BYTES, Segment

HEADER = struct.Struct("<HHIQI4xQII")
_LONG = 0x0002
_HINT = "do not replay it; find another copy of this segment (in the receiver's directory or the replica store)"


@dataclass(frozen=True)
class Header:
    """The system identifier of the cluster that wrote it, the timeline of its first page, its LSN, its size."""

    system: int
    timeline: int
    start: int
    segment_bytes: int


def read_header(content: bytes, name: str) -> Header:
    """Read the header of a segment's content, or of its beginning.

    Raises:
        VerificationFailed: it has no segment header.
    """
    try:
        magic, info, timeline, start, _, system, size, page = HEADER.unpack_from(content)
    except struct.error:
        raise VerificationFailed(f"{name} is too short to be a WAL segment", _HINT) from None
    is_size = not size & (size - 1) and 1 << 20 <= size <= MOST_SEGMENT_BYTES
    if not magic & 0xD000 or not info & _LONG or not page or not is_size:
        raise VerificationFailed(f"{name} has no WAL segment header", _HINT)
    return Header(system, timeline, start, size)


def require_own(content: bytes, segment: Segment, system: int) -> None:
    """Check that a segment's content matches its name and the cluster `system`. A segment in which a timeline begins
    has pages of the previous one.

    Raises:
        VerificationFailed: it is from another cluster, another segment, or incomplete.
    """
    found = read_header(content, segment.name)
    if found.system != system:
        message = f"{segment.name} is from another cluster: its system identifier is {found.system}, not {system}"
        raise VerificationFailed(message, _HINT)
    if found.start != segment.start or found.timeline > segment.timeline or found.segment_bytes != segment.bytes:
        raise VerificationFailed(f"{segment.name} contains another segment of the same cluster", _HINT)
    if len(content) != segment.bytes:
        raise VerificationFailed(f"{segment.name} has {len(content)} bytes instead of {segment.bytes}", _HINT)
