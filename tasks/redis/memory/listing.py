"""The first keys of a pattern (§2.1), without KEYS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from blocks.redis.server import Redis
from runbook.kinds import probe
from tasks.redis.keys import bytes_of
from tasks.redis.memory.reader import read_facts, reader_for
from tasks.redis.memory.script import KeyFacts
from tasks.redis.server import call, connected, key_counts

MATCH_PAGE_KEYS = 500


@dataclass(frozen=True)
class Listing:
    """The first keys of a pattern. Where it is not complete the time was over."""

    keys: tuple[tuple[int, KeyFacts], ...]
    denied: int
    is_complete: bool
    seconds: float


@probe
def find_first_keys(block: Redis, pattern: str, most: int, budget_seconds: float) -> Listing:
    """The first keys that match a glob pattern (https://valkey.io/commands/keys/; `\\xNN` is a byte), in all databases,
    in SCAN's order.

    Raises:
        Unreachable, OpsError: as `survey_keys`.
    """
    glob, started = bytes_of(pattern, glob=True), time.monotonic()
    found: list[tuple[int, KeyFacts]] = []
    denied, is_complete = 0, True
    with connected(block) as client:
        reader_for(client)[0].close()  # says which command is forbidden
        for number, keys in matching(client, glob):
            if len(found) >= most:
                break
            if time.monotonic() > started + budget_seconds:
                is_complete = False
                break
            facts, forbidden = read_facts(client, number, keys[: most - len(found)]) if keys else ([], 0)
            found += [(number, each) for each in facts]
            denied += forbidden
    return Listing(tuple(found), denied, is_complete, time.monotonic() - started)


def matching(client: redis.Redis, glob: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """All databases, page after page: (database, keys that match and were not in one before)."""
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
