"""Files that went bad on a disk."""

from __future__ import annotations

from pathlib import Path

BYTES = 64


def garble(path: Path, part: float = 0.5) -> None:
    """Invert some bytes at a part of its length. More than one bit: in a packed run of zeros that may mean the same."""
    content = bytearray(path.read_bytes())
    begin = int(len(content) * part)
    content[begin : begin + BYTES] = bytes(byte ^ 0xFF for byte in content[begin : begin + BYTES])
    path.write_bytes(content)
