"""The first keys that match a pattern (§2.1), without KEYS."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.keys import bytes_of
from tasks.redis.memory.script import TYPES, KeyFacts, require_commands
from tasks.redis.server import call, connected, key_counts

MATCH_PAGE_KEYS = 500


@dataclass(frozen=True)
class KeyListing:
    """The first keys of a pattern, with their databases. Not complete: the time limit was reached."""

    keys: tuple[tuple[int, KeyFacts], ...]
    denied: int
    is_complete: bool
    seconds: float


@probe
def find_first_keys(block: Redis, pattern: str, most: int, budget_seconds: float) -> KeyListing:
    """The first keys that match a glob pattern (https://valkey.io/commands/keys/; `\\xNN` is a byte), in all databases,
    in SCAN's order.

    Raises:
        Unreachable: the server is down.
        OpsError: the user may not run a command, which is named.
    """
    glob, started = bytes_of(pattern, glob=True), time.monotonic()
    found: list[tuple[int, KeyFacts]] = []
    denied, is_complete = 0, True
    with connected(block) as client:
        require_commands(client)
        for number, keys in matching(client, glob):
            if len(found) >= most:
                break
            if time.monotonic() > started + budget_seconds:
                is_complete = False
                break
            facts, forbidden = _read_facts(client, number, keys[: most - len(found)]) if keys else ([], 0)
            found += [(number, each) for each in facts]
            denied += forbidden
    return KeyListing(tuple(found), denied, is_complete, time.monotonic() - started)


def matching(client: redis.Redis, glob: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """All databases, page after page: (database, matching keys that no earlier page had)."""
    for number in sorted(key_counts(client)):
        cursor, seen = 0, set[bytes]()
        while True:
            with client.pipeline(transaction=False) as pipe:
                call(pipe, "SELECT", number)
                call(pipe, "SCAN", cursor, "MATCH", glob, "COUNT", MATCH_PAGE_KEYS)
                answers: list[Any] = pipe.execute()
            cursor, keys = int(answers[1][0]), answers[1][1]
            yield number, [key for key in dict.fromkeys(keys) if key not in seen]
            if cursor == 0:
                break
            seen.update(keys)


def _read_facts(client: redis.Redis, database: int, keys: Sequence[bytes]) -> tuple[list[KeyFacts], int]:
    """Bytes, type and TTL of the keys that still exist; and how many the user may not read."""
    with client.pipeline(transaction=False) as pipe:
        call(pipe, "SELECT", database)
        for key in keys:
            call(pipe, "MEMORY USAGE", key)
            call(pipe, "TYPE", key)
            call(pipe, "PTTL", key)
        answers = pipe.execute(raise_on_error=False)[1:]
    found, denied = [], 0
    for key, size, kind, ttl in zip(keys, answers[::3], answers[1::3], answers[2::3], strict=True):
        if any(isinstance(answer, redis.exceptions.NoPermissionError) for answer in (size, kind, ttl)):
            denied += 1
        elif size is not None and kind != b"none" and ttl != -2:
            name = kind.decode(errors="replace")
            place = TYPES.index(name) if name in TYPES else len(TYPES) - 1
            found.append(KeyFacts(key, int(size), place, int(ttl)))
    return found, denied
