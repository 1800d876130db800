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
from typing import IO, cast

from runbook.errors import VerificationFailed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ENDING = ".zst"
LEVEL = 1
"""More would cost more time than the smaller size saves: level 3 takes twice the time for 5 % of a dump."""
THREADS = 2
"""Of one stream. Where many files are compressed at the same time, each is one stream with a thread."""
CHUNK_BYTES = 1 << 20
_MAGIC = b"\x28\xb5\x2f\xfd"
UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError)
"""What reading raises if the stored content is damaged or cut off."""


def compress(content: bytes, *, threads: int = 0) -> bytes:
    """One frame, with a checksum of the content. `threads`: besides this one; 0 compresses here."""
    return zstd.compress(content, options=_options(threads))


def decompress(content: bytes) -> bytes:
    """The content of all frames, or of all members of gzip, by their first bytes.

    Raises:
        EOFError, ZstdError, BadGzipFile, zlib.error (`UNREADABLE`): it is damaged or cut off.
    """
    return zstd.decompress(content) if content.startswith(_MAGIC) else gzip.decompress(content)


def writer(target: Path | IO[bytes], *, threads: int = THREADS) -> IO[bytes]:
    """A stream to write to; close it. A file below it that was given open stays open."""
    return cast(IO[bytes], zstd.ZstdFile(target, "wb", options=_options(threads)))


@contextmanager
def reader(source: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """A stream to read from, zstd or gzip by the first bytes. It raises `UNREADABLE` while it is read. A file that was
    given open stays open.

    Raises:
        OSError: the file cannot be opened.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        head = io.BufferedReader(cast(io.RawIOBase, file), CHUNK_BYTES)
        content = zstd.ZstdFile(head) if head.peek(4).startswith(_MAGIC) else gzip.GzipFile(fileobj=head)
        with content as stream:
            yield cast(IO[bytes], stream)
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
