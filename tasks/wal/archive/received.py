"""A file of the receiver's directory: read, hashed and compressed once for all archives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from runbook.files import inside
from tasks.backups import codec
from tasks.wal.archive.archive import written
from tasks.wal.format.header import Header, read_header
from tasks.wal.format.names import HISTORY, PARTIAL, Segment

Mark = tuple[str, int, int]
"""A file's name, size and time of modification."""
FRAME_BYTES = 1 << 20


@dataclass
class Frames:
    """The compressed beginning of the unfinished segment, in frames of one block each. Only blocks that changed since
    the last call are compressed again."""

    _content: bytes = b""
    _packed: list[bytes] = field(default_factory=list)

    def compress(self, content: bytes, end: int) -> bytes:
        """Compress a segment that is written up to `end`."""
        full = end // FRAME_BYTES
        same = next((i for i in range(full) if i >= len(self._packed) or not self._is_same(content, i)), full)
        del self._packed[same:]
        self._packed += [codec.compress(_block(content, number)) for number in range(same, full)]
        self._content = content
        return b"".join((*self._packed, codec.compress(content[full * FRAME_BYTES :])))

    def _is_same(self, content: bytes, number: int) -> bool:
        return _block(content, number) == _block(self._content, number)


def _block(content: bytes, number: int) -> bytes:
    return content[number * FRAME_BYTES : (number + 1) * FRAME_BYTES]


@dataclass
class ReceivedFile:
    """A segment, an unfinished segment, or a history. Its content is read on first use."""

    path: Path
    frames: Frames

    @cached_property
    def mark(self) -> Mark:
        """See `Mark`.

        Raises:
            FileNotFoundError: it was finished and renamed, or deleted.
        """
        found = self.path.stat()
        return self.path.name, found.st_size, found.st_mtime_ns

    @property
    def is_history(self) -> bool:
        """Whether it is the history of a timeline."""
        return bool(HISTORY.fullmatch(self.path.name))

    @property
    def is_partial(self) -> bool:
        """Whether it is an unfinished segment."""
        return bool(PARTIAL.fullmatch(self.path.name))

    @cached_property
    def content(self) -> bytes:
        """The file's content. An unfinished file is read twice, and both reads agree on the result: a page read before
        it is written, followed by one read after, would look like damage. It is filled with zeros to its full size."""
        content = inside.read(self.path)
        if not self.is_partial:
            return content
        agreed = inside.read(self.path)[: written(content)]
        size = read_header(content, self.path.name).segment_bytes
        return agreed.ljust(max(size, len(content)), b"\0")

    @cached_property
    def header(self) -> Header:
        """The header of a segment.

        Raises:
            VerificationFailed: it has none.
        """
        return read_header(self.content, self.path.name)

    @property
    def segment(self) -> Segment:
        """The segment of its name."""
        return Segment.named(self.path.name[:24], self.header.segment_bytes)

    @cached_property
    def end(self) -> int:
        """The end of an unfinished segment's content; 0 for a finished file."""
        return written(self.content) if self.is_partial else 0

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def packed(self) -> bytes:
        """The compressed content."""
        return self.frames.compress(self.content, self.end) if self.is_partial else codec.compress(self.content)
