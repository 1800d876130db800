"""Single lines of logs: lines that are not JSON objects, and the first line."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from tasks.logs.reading.files import LogFile

BUDGET_SECONDS = 10.0
LONGEST = 200
_STEP = 100_000
_OPEN = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


@dataclass(frozen=True)
class LogSample:
    """A line's number (from 1) and its beginning."""

    file: str
    line: int
    text: str


def find_bad_lines(files: Sequence[LogFile], most: int = 5) -> list[LogSample]:
    """The first lines of files that are not packed which do not begin and end like a JSON object, newest file first.

    A line that does, and is none all the same, is not found here: only counted where all are read.
    """
    found, end = list[LogSample](), time.monotonic() + BUDGET_SECONDS
    for file in reversed([file for file in files if not file.packed]):
        try:
            content = file.path.open("rb")
        except OSError:
            continue
        number = 0
        with content:
            while (lines := list(islice(content, _STEP))) and time.monotonic() < end:
                for line in lines:
                    number += 1
                    text = line.strip()
                    if text and not (text.startswith(b"{") and text.endswith(b"}")):
                        found.append(
                            LogSample(file.path.name, number, text[:LONGEST].decode(errors="backslashreplace"))
                        )
                    if len(found) == most:
                        return found
    return found


def is_half_written(files: Sequence[LogFile]) -> bool:
    """Whether the newest file ends in an incomplete line: the application is writing it, or was killed."""
    if not files or files[-1].packed:
        return False
    try:
        with files[-1].path.open("rb") as content:
            content.seek(0, 2)
            if not content.tell():
                return False
            content.seek(-1, 2)
            return content.read(1) != b"\n"
    except OSError:
        return False


def begins_at(file: LogFile, field: str = "timestamp") -> datetime | None:
    """The first time in the first thousand lines of a file; None: there is none."""
    opener = _OPEN.get(file.packed, open)
    try:
        with opener(file.path, "rb") as content:  # type: ignore[operator]
            for line in islice(content, 1000):
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    moment = datetime.fromisoformat(json.loads(line)[field].replace(",", "."))
                    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        return None
    return None
