"""Copy keys from one server to another (DUMP and RESTORE), in small parts, so that other clients do not wait long.

A TTL is copied as an absolute time (ABSTTL). Expiring fields, and groups and pending entries of streams, are part of
the value. https://valkey.io/commands/restore/
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runbook.errors import OpsError
from runbook.log import logger
from tasks.redis.line import RedisLine

PAGE_KEYS = 1000
BATCH_KEYS = 100
BATCH_BYTES = 1 << 18
LARGE_BYTES = 1 << 20
PROGRESS_SECONDS = 5.0


@dataclass
class Carried:
    """The copied keys. `expired` keys were skipped. `large` values exceed 1 MiB, and block a server while it reads or
    writes them: `slowest_seconds` is the longest round trip."""

    keys: int = 0
    bytes: int = 0
    expired: int = 0
    large: int = 0
    slowest_seconds: float = 0.0
    reported: float = field(default_factory=time.monotonic)


def bytes_of(text: str, *, glob: bool = False) -> bytes:
    """A parameter's bytes: UTF-8, and `\\xNN` for a byte, as reports show them (`\\x5c` is a backslash).

    Raises:
        OpsError: it has a character that is not UTF-8.
    """
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise OpsError(f"{text!a} cannot be part of a key", "write bytes that are not UTF-8 as \\xNN") from None
    return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda found: (b"\\" if glob else b"") + bytes([int(found[1], 16)]), raw)


def read_prefix(text: str) -> bytes:
    r"""A prefix as people write it; `\xff` is a byte.

    Raises:
        OpsError: it is empty, or has a character that is not UTF-8.
    """
    if not text:
        raise OpsError("an empty prefix means every key", "name prefixes, or restore without prefixes")
    return bytes_of(text)


def widest(prefixes: Sequence[bytes]) -> tuple[bytes, ...]:
    """The prefixes that no other one covers, in order."""
    return tuple(
        sorted({one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes)})
    )


def under(prefix: bytes) -> bytes:
    """The glob pattern of the keys that begin with `prefix`."""
    return re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix) + b"*"


def keys_under(line: RedisLine, database: int, prefix: bytes) -> Iterator[list[bytes]]:
    """The keys of a database that begin with `prefix`, page by page. SCAN can return a key twice."""
    pattern = under(prefix)
    cursor = b"0"
    while True:
        cursor, page = line.call(database, "SCAN", cursor, "MATCH", pattern, "COUNT", PAGE_KEYS)
        if page:
            yield page
        if cursor == b"0":
            return


def batches(
    line: RedisLine, database: int, keys: Sequence[bytes], most_bytes: int = BATCH_BYTES
) -> Iterator[tuple[list[bytes], int]]:
    """Keys in groups of limited bytes, and each group's bytes; a large value is a separate group."""
    sizes = line.pipe(database, [("MEMORY", "USAGE", key) for key in keys])
    line.refuse(sizes)
    group: list[bytes] = []
    total = 0
    for key, size in zip(keys, sizes, strict=True):
        if group and (total + (size or 0) > most_bytes or len(group) == BATCH_KEYS):
            yield group, total
            group, total = [], 0
        group.append(key)
        total += size or 0
    if group:
        yield group, total


def carry(source: RedisLine, target: RedisLine, database: int, keys: Sequence[bytes], done: Carried) -> None:
    """Copy keys of one database; they replace the target's.

    Raises:
        Unreachable, OpsError: a server refuses, or its connection broke. Keys copied before stay.
    """
    for group, size in batches(source, database, keys):
        started, now = time.monotonic(), time.time_ns() // 1_000_000
        asked = [command for key in group for command in (("DUMP", key), ("PEXPIRETIME", key))]
        answers = source.pipe(database, asked, together=True)
        source.refuse(answers)
        restores = []
        for key, payload, at in zip(group, answers[::2], answers[1::2], strict=True):
            if payload is None or 0 < at <= now:
                done.expired += 1
            else:
                restores.append(("RESTORE", key, max(at, 0), payload, "REPLACE", "ABSTTL"))
        target.refuse(target.pipe(database, restores))
        done.keys += len(restores)
        done.bytes += size
        done.large += size > LARGE_BYTES
        done.slowest_seconds = max(done.slowest_seconds, time.monotonic() - started)
        if time.monotonic() - done.reported > PROGRESS_SECONDS:
            done.reported = time.monotonic()
            logger().info("database %d: %d keys copied", database, done.keys)
