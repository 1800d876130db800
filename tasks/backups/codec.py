"""The compression of everything stored: zstd (RFC 8878), with one level and one number of threads. What earlier
versions compressed with gzip stays readable.

The library is Python's own (`compression.zstd`, 3.14), or its backport: unlike `zstandard` it raises an error for
content that is cut off.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from runbook.errors import VerificationFailed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ENDING = ".zst"
LEVEL = 1
"""More would cost more time than the smaller size saves: level 3 takes twice the time for 5 % of a dump."""
THREADS = 2
"""Of one stream. Where many files are compressed at the same time, each is one stream with a thread."""
CHUNK_BYTES = 1 << 20
_MAGIC = b"\x28\xb5\x2f\xfd"
MOST_BYTES = 4 << 30
"""The most that is decompressed in memory."""
UNBOUNDED = sys.maxsize
"""For content whose size nothing states, and content that this process has just compressed."""


class Oversized(ValueError):
    """Stored content decompresses to more bytes than it should have: it is damaged, or a decompression bomb."""


UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError, Oversized)
"""What reading raises if the stored content is damaged, cut off or oversized."""


def compress(content: bytes, *, threads: int = 0) -> bytes:
    """One frame, with a checksum of the content. `threads`: besides this one; 0 compresses here."""
    return zstd.compress(content, options=_options(threads))


def decompress(content: bytes, most: int = MOST_BYTES) -> bytes:
    """The content of all frames, or of all members of gzip, by their first bytes: at most `most` bytes.

    Raises:
        EOFError, ZstdError, BadGzipFile, zlib.error, Oversized (`UNREADABLE`): it is damaged, cut off or oversized.
    """
    with reader(io.BytesIO(content), most) as stream:
        return stream.read()


class _Bounded(io.RawIOBase):
    """A stream that is not read further than `most` bytes: those after them may be endless."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._most, self._left = stream, most, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return self.readall()
        chunk = self._stream.read(min(size, self._left + 1))
        self._left -= len(chunk)
        if self._left < 0:
            raise Oversized(f"its content is larger than the expected {self._most:,} bytes")
        return chunk

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(CHUNK_BYTES), b""))  # one read of that size would reserve all of it

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        chunk = self.read(len(target))
        target[: len(chunk)] = chunk
        return len(chunk)


def bounded(stream: IO[bytes], most: int) -> IO[bytes]:
    """The same stream, which raises `Oversized` once it has more than `most` bytes."""
    return cast(IO[bytes], _Bounded(stream, most))


def writer(target: Path | IO[bytes], *, threads: int = THREADS) -> IO[bytes]:
    """A stream to write to; close it. A file below it that was given open stays open."""
    return cast(IO[bytes], zstd.ZstdFile(target, "wb", options=_options(threads)))


@contextmanager
def reader(source: Path | IO[bytes], most: int) -> Iterator[IO[bytes]]:
    """A stream to read from, zstd or gzip by the first bytes: at most `most` bytes. It raises `UNREADABLE` while it is
    read. A file that was given open stays open.

    Raises:
        OSError: the file cannot be opened.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        head = io.BufferedReader(cast(io.RawIOBase, file), CHUNK_BYTES)
        content = zstd.ZstdFile(head) if head.peek(4).startswith(_MAGIC) else gzip.GzipFile(fileobj=head)
        with content as stream:
            yield bounded(cast(IO[bytes], stream), most)
        head.detach()


@contextmanager
def readable(what: str, hint: str) -> Iterator[None]:
    """Translate damage that is found while stored content is read.

    Raises:
        VerificationFailed: it is damaged or cut off.
    """
    try:
        yield
    except UNREADABLE as error:
        raise VerificationFailed(f"{what} is damaged: {error}", hint) from None


def _options(threads: int) -> dict[int, int]:
    named = zstd.CompressionParameter
    return {named.compression_level: LEVEL, named.checksum_flag: 1, named.nb_workers: threads}
