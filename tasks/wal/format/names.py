"""LSNs, segments, timelines and their histories, by name and by number.

https://www.postgresql.org/docs/current/wal-internals.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from runbook.errors import VerificationFailed

SEGMENT_BYTES = 16 << 20
MOST_SEGMENT_BYTES = 1 << 30
"""https://www.postgresql.org/docs/current/app-initdb.html: --wal-segsize"""
SEGMENT = re.compile(r"[0-9A-F]{24}")
PARTIAL = re.compile(r"([0-9A-F]{24})\.partial")
HISTORY = re.compile(r"([0-9A-F]{8})\.history")
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")


def lsn_of(text: str) -> int:
    """`0/3000060` as a number of bytes.

    Raises:
        ValueError: it is no LSN.
    """
    match = _LSN.fullmatch(text.strip())
    if not match:
        raise ValueError(f"“{text[:40]}” is no LSN")
    return (int(match[1], 16) << 32) + int(match[2], 16)


def lsn_text(lsn: int) -> str:
    """As PostgreSQL prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


@dataclass(frozen=True, order=True)
class Segment:
    """One segment of WAL: `number` times its size is the LSN of its first byte."""

    number: int
    timeline: int
    bytes: int = SEGMENT_BYTES

    @classmethod
    def named(cls, name: str, bytes_: int = SEGMENT_BYTES) -> Segment:
        """From a file's name: 24 hexadecimal digits."""
        timeline, log, part = (int(name[start : start + 8], 16) for start in (0, 8, 16))
        return cls(log * (0x100000000 // bytes_) + part, timeline, bytes_)

    @property
    def name(self) -> str:
        """The name of its file."""
        per_log = 0x100000000 // self.bytes
        return f"{self.timeline:08X}{self.number // per_log:08X}{self.number % per_log:08X}"

    @property
    def start(self) -> int:
        """The LSN of its first byte."""
        return self.number * self.bytes

    @property
    def end(self) -> int:
        """The LSN after its last byte."""
        return self.start + self.bytes


@dataclass(frozen=True)
class Timeline:
    """A timeline and its ancestors, oldest first, each with the LSN at which it was left."""

    number: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, number: int, text: str) -> Timeline:
        """From a history file's text. A recovery along a timeline that ended before it was reached has that one in its
        history all the same, with its own end: what came before it was left there too.

        Raises:
            VerificationFailed: it is not a history.
        """
        found = []
        for line in text.splitlines():
            words = line.split("#")[0].split()
            if not words:
                continue
            try:
                found.append((int(words[0]), lsn_of(words[1])))
            except (ValueError, IndexError):
                message = f"{number:08X}.history is no timeline history: “{line[:60]}”"
                raise VerificationFailed(
                    message, "copy it from the primary's pg_wal, or choose another timeline"
                ) from None
        ends = [min(lsn for _, lsn in found[index:]) for index in range(len(found))]
        return cls(number, tuple((timeline, end) for (timeline, _), end in zip(found, ends, strict=True)))

    def left_at(self, timeline: int) -> int | None:
        """The LSN up to which `timeline` is part of this history; None if it is not. This timeline itself has no
        end."""
        if timeline == self.number:
            return 1 << 63
        return dict(self.ancestors).get(timeline)

    def candidates(self, number: int, bytes_: int = SEGMENT_BYTES) -> list[Segment]:
        """The possible files of a segment of this history, the newest timeline's first: it begins with a copy of what
        is before the switch."""
        begins = [(self.number, self.ancestors[-1][1] if self.ancestors else 0)]
        for index in range(len(self.ancestors) - 1, -1, -1):
            begins.append((self.ancestors[index][0], self.ancestors[index - 1][1] if index else 0))
        ends = dict(self.ancestors)
        return [
            Segment(number, timeline, bytes_)
            for timeline, begin in begins
            if begin // bytes_ <= number and number * bytes_ < ends.get(timeline, 1 << 63)
        ]
