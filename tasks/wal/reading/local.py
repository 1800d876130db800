"""The segments of a directory of this host: the receiver's, or a server's own pg_wal."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from tasks.wal.format.header import HEADER, read_header
from tasks.wal.format.names import PARTIAL, SEGMENT, Segment

_LISTINGS = 10


@dataclass(frozen=True)
class Local:
    """One file: which segment it is by its name and by the header in it, and whose (the system identifier)."""

    path: Path
    segment: Segment
    system: int

    @property
    def name(self) -> str:
        """As a finished one is called."""
        return self.segment.name

    @property
    def timeline(self) -> int:
        """By its name."""
        return self.segment.timeline

    @property
    def start(self) -> int:
        """The LSN of its first byte."""
        return self.segment.start

    @property
    def bytes(self) -> int:
        """Of a whole one."""
        return self.segment.bytes


def find_segments(directory: Path) -> list[Local]:
    """The segments of a directory in order, a `.partial` one too where it is not there whole.

    Those that were kept for later use, whose names are ahead of what is in them, are not among them.

    Raises:
        OpsError: the directory cannot be read.
    """
    try:
        for _ in range(_LISTINGS):
            with contextlib.suppress(FileNotFoundError):  # one was finished, and renamed, or taken for a new one
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
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    try:
        header = read_header(head, path.name)
    except VerificationFailed:  # made, and not written yet
        return None
    segment = Segment.named(path.name.removesuffix(".partial"), header.segment_bytes)
    return Local(path, segment, header.system) if header.start == segment.start else None
