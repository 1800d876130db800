"""Bits of packed files that are other ones: such that what is unpacked is another one too."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

_HEADER_BYTES = 10


def flip(path: Path) -> None:
    """One bit of a gzip file that matters: of its middle, else nearer to its beginning. In a packed run of zeros (most
    of a segment of WAL is one) another code often stands for the same zeros, and then nothing is damaged."""
    content = path.read_bytes()
    whole, place = gzip.decompress(content), len(content) // 2
    while place >= _HEADER_BYTES:
        altered = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        if _unpacked(altered) != whole:
            path.write_bytes(altered)
            return
        place //= 2
    raise AssertionError(f"no bit of {path} that was tried matters")


def _unpacked(content: bytes) -> bytes | None:
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None
