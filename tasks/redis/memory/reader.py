"""How pages of keys are read: by a script in the server, or by a pipeline where the user may run none."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import redis

from tasks.redis.memory.script import (
    BYTES,
    BYTES_WITHOUT_TTL,
    PAGE,
    SHA,
    TTL_LIMITS_MS,
    TTLS,
    TYPES,
    WIDTH,
    KeyFacts,
    Page,
    Request,
    parsed,
    prefix_of,
)
from tasks.redis.server import call

SHORT_SCRIPT = "return 1"


class Reader(Protocol):
    """Asks for a page, and gives it. Between the two the server works, and the caller may."""

    seconds: float
    """How long the last page's longest call took there and back (or until the caller came for it)."""

    def ask(self, request: Request) -> None:
        """Send a request."""

    def page(self) -> Page:
        """The answer to it."""

    def close(self) -> None:
        """Give the connection back."""


class ScriptReader:
    """Pages by EVALSHA_RO, over one connection of the client's."""

    def __init__(self, client: redis.Redis) -> None:
        self._pool = client.connection_pool
        self._connection: Any = self._pool.get_connection()
        self._request = Request(0, b"0", 1)
        self._sent = self.seconds = 0.0

    def ask(self, request: Request) -> None:
        """See Reader."""
        self._request, self._sent = request, time.perf_counter()
        self._connection.send_command("EVALSHA_RO", SHA, 0, request.numbers, request.parted)

    def page(self) -> Page:
        """See Reader."""
        try:
            answer = self._connection.read_response()
        except redis.exceptions.NoScriptError:
            self._connection.send_command("EVAL_RO", PAGE, 0, self._request.numbers, self._request.parted)
            answer = self._connection.read_response()
        self.seconds = time.perf_counter() - self._sent
        return parsed(answer)

    def close(self) -> None:
        """See Reader. An answer may be under way: the connection is not used again."""
        self._connection.disconnect()
        self._pool.release(self._connection)


class PipelineReader:
    """Pages by SCAN and a pipeline of single commands. The server serves others between two buffers of a pipeline."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._request = Request(0, b"0", 1)
        self.seconds = 0.0

    def ask(self, request: Request) -> None:
        """See Reader: nothing is sent yet."""
        self._request = request

    def page(self) -> Page:
        """See Reader."""
        request, started = self._request, time.perf_counter()
        with self._client.pipeline(transaction=False) as pipe:
            call(pipe, "SELECT", request.database)
            call(pipe, "SCAN", request.cursor, "COUNT", request.count)
            _, (cursor, keys) = pipe.execute()
        self.seconds = time.perf_counter() - started
        found, denied = read_facts(self._client, request.database, keys)
        gone = len(keys) - len(found) - denied
        hot = _hits(self._client, request, found) if request.hottest >= 0 else ()
        biggest = tuple(facts for facts in found if facts.size > request.floors[facts.type])
        groups = _grouped(found, request.parted)
        sums = b" ".join(b"%d" % number for numbers in groups.values() for number in numbers)
        return Page(_text(cursor), len(found), gone, denied, 0.0, tuple(groups), sums, biggest, hot)

    def close(self) -> None:
        """See Reader."""


def reader_for(client: redis.Redis) -> tuple[Reader, str]:
    """The fastest reader that the server and the user's rights allow, and why it is not the script ("" where it is).

    Raises:
        redis.NoPermissionError: the user may not SCAN, or not read a key's size, type or TTL; it names the command.
    """
    for words in (("SELECT", 0), ("SCAN", 0, "COUNT", 1), ("MEMORY", "USAGE", ""), ("TYPE", ""), ("PTTL", "")):
        try:
            call(client, *words)
        except redis.exceptions.NoPermissionError as error:
            if "to run the" in str(error):  # else only that key is forbidden
                raise
    try:
        call(client, "EVAL_RO", SHORT_SCRIPT, 0)
        call(client, "EVALSHA_RO", hashlib.sha1(SHORT_SCRIPT.encode(), usedforsecurity=False).hexdigest(), 0)
    except redis.ResponseError as error:  # forbidden, renamed, or a server before 7.0
        return PipelineReader(client), str(error)
    return ScriptReader(client), ""


def read_facts(client: redis.Redis, database: int, keys: Sequence[bytes]) -> tuple[list[KeyFacts], int]:
    """Bytes, type and TTL of keys, by a pipeline; what is gone is left out. Also how many the user may not read."""
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
            found.append(KeyFacts(key, int(size), _place(kind), int(ttl)))
    return found, denied


def _place(kind: bytes) -> int:
    name = kind.decode(errors="replace")
    return TYPES.index(name) if name in TYPES else len(TYPES) - 1


def _grouped(found: Sequence[KeyFacts], parted: bytes) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = {}
    for facts in found:
        group = groups.setdefault(prefix_of(facts.key, parted), [0] * WIDTH)
        group[facts.type] += 1
        group[BYTES.start + facts.type] += facts.size
        bucket = 0 if facts.ttl_ms < 0 else 1 + sum(facts.ttl_ms >= limit for limit in TTL_LIMITS_MS)
        group[TTLS.start + bucket] += 1
        if facts.ttl_ms < 0:
            group[BYTES_WITHOUT_TTL] += facts.size
    return groups


def _hits(client: redis.Redis, request: Request, found: Sequence[KeyFacts]) -> tuple[tuple[int, bytes], ...]:
    with client.pipeline(transaction=False) as pipe:
        call(pipe, "SELECT", request.database)
        for facts in found:
            call(pipe, "OBJECT FREQ", facts.key)
        answers = pipe.execute(raise_on_error=False)[1:]
    pairs = zip(answers, found, strict=True)
    return tuple((hits, facts.key) for hits, facts in pairs if isinstance(hits, int) and hits > request.hottest)


def _text(cursor: object) -> bytes:
    return cursor if isinstance(cursor, bytes) else str(cursor).encode()
