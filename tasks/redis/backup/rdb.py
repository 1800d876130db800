"""RDB files: the header, and whether a server can read it.

Each server reads the versions up to its own, but not the other family's newer ones: Valkey 9 (`VALKEY080`) reads
`REDIS0011` and refuses 12 to 79, Redis 8 (`REDIS0012`) refuses `VALKEY…`. The header shows that before anything is
loaded. https://valkey.io/topics/RDB/ and https://rdb.fnordig.de/file_format.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import redis

from blocks.redis.server import Redis
from runbook.errors import VerificationFailed
from runbook.files import inside
from runbook.kinds import probe
from tasks.redis.scratch import scratch_server
from tasks.redis.scratch_place import scratch_place
from tasks.redis.server import call, program_version

HEADER_BYTES, CHECKSUM_BYTES = 9, 8
CHECKSUM_SINCE = 5
AUX, END = 0xFA, 0xFF
POLYNOMIAL = 0x95AC9329AC4BC9B5
"""Redis's CRC-64 (Jones), reflected."""
_WRONG_VERSION = "payload version or checksum"
NO_TYPE = 0xFE
"""No value has this type: a payload with it is refused because of its version, or of its type."""
NEWEST_TRIED = 255


@dataclass(frozen=True)
class RdbFile:
    """An RDB's header. `tool` wrote it ("": unknown), at `written`. `checksum` False: saved with `rdbchecksum no`, so a
    flipped byte inside a value cannot be detected. `complete`: it has a valid end."""

    header: str
    version: int
    tool: str
    written: datetime
    bytes: int
    checksum: bool
    complete: bool = True


@dataclass(frozen=True)
class Readable:
    """Whether a server program reads an RDB of a version; `accepted`: the versions that it reads."""

    version: int
    program: str
    accepted: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether it reads that version."""
        return self.version in self.accepted

    def describe(self) -> str:
        """For people: `RDB versions up to 11, and 80`."""
        runs = list[list[int]]()
        for version in self.accepted:
            if runs and runs[-1][1] == version - 1:
                runs[-1][1] = version
            else:
                runs.append([version, version])
        named = [
            f"up to {last}" if first <= 1 else f"{first}" if first == last else f"{first} to {last}"
            for first, last in runs
        ]
        return f"{self.program} reads RDB versions {', and '.join(named) or 'of no kind'}"


def read_rdb(path: Path) -> RdbFile:
    """Read an RDB's header, its auxiliary fields, and whether it has a valid end.

    Raises:
        VerificationFailed: it cannot be read, or is no RDB.
    """
    try:
        with inside.reading(path) as file:
            header = file.read(HEADER_BYTES)
            found = re.fullmatch(rb"(?:REDIS(?=\d{4})|VALKEY)(\d{3,4})", header)
            if not found:
                raise VerificationFailed(f"{path.name} is no RDB: it begins with {header!r}", "choose another file")
            notes = dict(_notes(file))
            size = file.seek(0, 2)
            file.seek(max(size - CHECKSUM_BYTES - 1, 0))
            ending = file.read()
    except OSError as error:
        raise VerificationFailed(f"{path} cannot be read: {error.strerror}", "correct the path or its rights") from None
    version, at = int(found[1]), notes.get("ctime", "")
    tool = next((f"{name} {notes[f'{name}-ver']}" for name in ("valkey", "redis") if f"{name}-ver" in notes), "")
    written = float(at) if at.isdigit() else path.stat().st_mtime
    checksum = version >= CHECKSUM_SINCE and ending[1:] != bytes(CHECKSUM_BYTES)
    complete = (ending[:1] if version >= CHECKSUM_SINCE else ending[-1:]) == bytes([END])
    return RdbFile(header.decode(), version, tool, datetime.fromtimestamp(written, UTC), size, checksum, complete)


def _notes(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """The auxiliary fields at an RDB's beginning: the program and the time."""
    while file.read(1) == bytes([AUX]):
        name, value = _string(file), _string(file)
        if name is None or value is None:
            return
        yield name, value


def _string(file: BinaryIO) -> str | None:
    """A length-encoded string or integer; None: compressed or truncated."""
    first = file.read(1)
    if not first:
        return None
    kind, low = first[0] >> 6, first[0] & 0x3F
    if kind == 3:
        width = {0: 1, 1: 2, 2: 4}.get(low)
        return str(int.from_bytes(file.read(width), "little", signed=True)) if width else None
    if kind == 2:
        return None
    length = low if kind == 0 else (low << 8) + int.from_bytes(file.read(1), "big")
    return file.read(length).decode(errors="replace")


@probe
def read_readable(block: Redis, version: int) -> Readable:
    """The RDB versions that the server program of `block` reads, found out with an empty scratch server.

    Raises:
        OpsError: the program is not installed, or does not start.
    """
    with scratch_place() as place, scratch_server(block, place) as client:
        return Readable(version, program_version(block), tuple(accepted_versions(client)))


def accepted_versions(client: redis.Redis) -> Iterator[int]:
    """The RDB versions that a server accepts by RESTORE. It is offered invalid values, whose version it checks first,
    so nothing is ever written."""
    with client.pipeline(transaction=False) as pipe:
        for version in range(1, NEWEST_TRIED + 1):
            pipe.restore("ops:no-such-key", 0, _impossible(version))
        answers = pipe.execute(raise_on_error=False)
    for version, answer in enumerate(answers, start=1):
        if _is_accepted(answer):
            yield version


def accepts(client: redis.Redis, version: int) -> bool:
    """Whether a server accepts payloads of one version; nothing is written."""
    try:
        answer = call(client, "RESTORE", "ops:no-such-key", 0, _impossible(version))
    except redis.RedisError as error:
        answer = error
    return _is_accepted(answer)


def _is_accepted(answer: object) -> bool:
    """The server checks the version first, then the value. Any other refusal (rights, memory, read only, a failed save)
    does not depend on the version, and is raised."""
    said = str(answer)
    if isinstance(answer, redis.RedisError) and not ("Bad data format" in said or _WRONG_VERSION in said):
        raise answer
    return "Bad data format" in said


def payload_version(payload: bytes) -> int:
    """The RDB version of a DUMP payload: two bytes before its checksum (https://valkey.io/commands/dump/)."""
    return int.from_bytes(payload[-10:-8], "little")


def _impossible(version: int) -> bytes:
    body = bytes([NO_TYPE]) + version.to_bytes(2, "little")
    return body + crc64(body).to_bytes(8, "little")


def crc64(content: bytes) -> int:
    """The checksum at the end of short RDB files and payloads; it reads byte by byte."""
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
    return value
