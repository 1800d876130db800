"""The segments in a directory of this host: the receiver's, or a server's pg_wal."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.files import inside
from tasks.wal.format.header import HEADER, read_header
from tasks.wal.format.names import PARTIAL, SEGMENT, Segment

_LISTINGS = 10


@dataclass(frozen=True)
class Local:
    """One file: its segment, by its name and its header, and its cluster (the system identifier)."""

    path: Path
    segment: Segment
    system: int

    @property
    def name(self) -> str:
        """The name of a finished segment."""
        return self.segment.name

    @property
    def timeline(self) -> int:
        """Its timeline by name."""
        return self.segment.timeline

    @property
    def start(self) -> int:
        """The LSN of its first byte."""
        return self.segment.start

    @property
    def bytes(self) -> int:
        """The size of a complete one."""
        return self.segment.bytes


def find_segments(directory: Path) -> list[Local]:
    """The segments of a directory in order, a `.partial` one included if no complete one exists.

    Recycled segments, whose content does not match their names, are left out.

    Raises:
        OpsError: the directory cannot be read.
    """
    try:
        for _ in range(_LISTINGS):
            with contextlib.suppress(FileNotFoundError):  # one was finished and renamed, or recycled
                return _found(directory)
        return _found(directory)
    except OSError as error:
        raise OpsError(f"{directory} cannot be read: {error.strerror}", "let this user read it") from None


def _found(directory: Path) -> list[Local]:
    paths = {path.name: path for path in directory.iterdir()}
    found = [
        _local(path)
        for name, path in paths.items()
        if name.removesuffix(".partial") not in paths or not name.endswith(".partial")
    ]
    return sorted((one for one in found if one), key=lambda one: (one.timeline, one.start))


def _local(path: Path) -> Local | None:
    if not (SEGMENT.fullmatch(path.name) or PARTIAL.fullmatch(path.name)):
        return None
    with inside.reading(path) as file:
        head = file.read(HEADER.size)
    try:
        header = read_header(head, path.name)
    except VerificationFailed:  # created, but not written yet
        return None
    segment = Segment.named(path.name.removesuffix(".partial"), header.segment_bytes)
    return Local(path, segment, header.system) if header.start == segment.start else None
