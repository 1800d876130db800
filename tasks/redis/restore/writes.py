"""Clients' writes under some prefixes during a run, reported by the server (client-side caching in broadcasting mode,
https://valkey.io/topics/client-side-caching/), to separate clients' differences from the run's own.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from blocks.redis.server import Redis
from runbook.errors import OpsError, Unreachable
from runbook.log import logger
from runbook.wait import until
from tasks.redis.line import RedisLine, live_line

INVALIDATED = b"__redis__:invalidate"
MOST_NAMES = 2_000_000
SETTLE_SECONDS = 30.0
END = b"end"
END_SECONDS = 2.0


class LiveWrites:
    """Names of keys that others wrote (or that expired, or were evicted) since the watch started, in any database.
    `problem`: why they are unknown, "": they are known."""

    def __init__(self) -> None:
        self.problem = ""
        self._names: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def known(self) -> bool:
        """Whether all writes are known."""
        return not self.problem

    def settle(self) -> None:
        """Wait until the server has reported every write so far."""


class WatchedWrites(LiveWrites):
    """The names from the server's messages."""

    def __init__(self, writer: RedisLine, reader: RedisLine) -> None:
        super().__init__()
        self._writer, self._reader = writer, reader
        self._marks: set[bytes] = set()
        self._channel = b"ops:settled:" + secrets.token_hex(8).encode()

    def settle(self) -> None:
        if self.problem:
            return
        mark = secrets.token_hex(8).encode()
        try:
            if not self._writer.call(0, "PUBLISH", self._channel, mark):
                self.problem = "the connection that receives clients' writes broke"
                return
            until(
                lambda: mark in self._marks or self.problem,
                what="word of all writes",
                seconds=SETTLE_SECONDS,
                every_seconds=0.005,
            )
        except Unreachable:
            raise
        except OpsError as error:
            self.problem = error.message

    def begin(self, prefixes: Sequence[bytes]) -> None:
        """Start tracking."""
        number = self._reader.call(0, "CLIENT", "ID")
        self._reader.subscribe(INVALIDATED, self._channel)
        named = [word for prefix in prefixes if prefix for word in ("PREFIX", prefix)]
        self._writer.call(0, "CLIENT", "TRACKING", "ON", "REDIRECT", number, "BCAST", *named, "NOLOOP")

    def read(self) -> None:
        """Listen until `end`, or until the connection breaks."""
        try:
            while END not in self._marks:
                self._take(self._reader.listen())
        except (OpsError, ValueError) as error:  # closed meanwhile
            self.problem = self.problem or str(error)

    def end(self) -> None:
        """Stop tracking."""
        with contextlib.suppress(OpsError):
            self._writer.call(0, "PUBLISH", self._channel, END)
            self._writer.call(0, "CLIENT", "TRACKING", "OFF")

    def _take(self, message: Any) -> None:
        kind, channel, content = message
        if kind != b"message":
            return
        if channel != INVALIDATED:
            self._marks.add(content)
        elif content is None:
            self.problem = "everything was flushed"
        elif len(self._names) < MOST_NAMES:
            self._names.update(content)
        else:
            self.problem = f"more than {MOST_NAMES:,} keys were written"


@contextlib.contextmanager
def watched_writes(block: Redis, line: RedisLine, prefixes: Sequence[bytes]) -> Iterator[LiveWrites]:
    """Track writes by clients other than `line` under `prefixes` (none, or an empty one: all keys).

    If the server or the user's rights do not permit it, `problem` says so, and nothing else changes.
    """
    with live_line(block) as reader:
        writes = WatchedWrites(line, reader)
        try:
            writes.begin([] if b"" in prefixes else prefixes)
        except Unreachable:
            raise
        except OpsError as error:
            writes.problem = error.message
            logger().warning("clients' writes meanwhile are unknown: %s", error.message)
            yield writes
            return
        listener = threading.Thread(target=writes.read, name="redis-writes", daemon=True)
        listener.start()
        try:
            yield writes
        finally:
            writes.end()
            listener.join(END_SECONDS)
