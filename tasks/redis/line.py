"""One connection to one server, for reads and writes key by key in several databases.

redis-py's client uses any connection of its pool, so SELECT and CLIENT TRACKING … NOLOOP are unreliable there; and its
pipelines raise at the first error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, VerificationFailed
from runbook.files import inside

Command = Sequence[object]
TRANSACTION = 2
"""MULTI and EXEC around the commands."""


class RedisLine:
    """A connection. Its errors are translated by `block.refused`."""

    def __init__(self, block: Redis, client: redis.Redis, *, scratch: bool) -> None:
        pool = client.connection_pool
        self._block, self._scratch = block, scratch
        # RESP3 and maintenance notices would put messages between the answers.
        known = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith("maint_")}
        self._connection: Any = pool.connection_class(**{**known, "protocol": 2, "db": 0})
        self._database = -1

    def call(self, database: int, *words: object) -> Any:
        """One command in one database; its error is raised."""
        (answer,) = self.pipe(database, [words])
        if isinstance(answer, Exception):
            raise self._told(answer)
        return answer

    def pipe(self, database: int, commands: Sequence[Command], *, together: bool = False) -> list[Any]:
        """Several commands in one round trip; their errors are among the answers. `together`: as one transaction.

        Raises:
            Unreachable: the connection broke; the commands may have been executed.
            OpsError: this user may not run them, or the database does not exist.
        """
        if not commands:
            return []
        wanted: list[Command] = [] if database == self._database else [("SELECT", database)]
        chosen = len(wanted)
        self._database = -1  # after an error, select it again
        wanted += [("MULTI",), *commands, ("EXEC",)] if together else commands
        answers = self._talk(wanted)
        for answer in (*answers[:chosen], *(answers[-1:] if together else ())):
            if isinstance(answer, Exception):
                raise self._told(answer)
        self._database = database
        return cast(list[Any], answers[-1]) if together else answers[chosen:]

    def subscribe(self, *channels: bytes) -> None:
        """Subscribe to channels; the connection then accepts no other command."""
        self._database = -1
        self.refuse(self._talk([("SUBSCRIBE", channel) for channel in channels]))

    def listen(self) -> Any:
        """Wait for the next message of a subscribed connection."""
        try:
            return self._connection.read_response(timeout=None)
        except redis.RedisError as error:
            raise self._told(error) from None

    def refuse(self, answers: Sequence[Any]) -> None:
        """Raise the first error among answers."""
        for answer in answers:
            if isinstance(answer, Exception):
                raise self._told(answer)

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _talk(self, commands: Sequence[Command]) -> list[Any]:
        connection, answers = self._connection, []
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            for _ in commands:
                try:
                    answers.append(connection.read_response())
                except redis.ResponseError as error:
                    answers.append(error)
        except redis.RedisError as error:
            raise self._told(error) from None
        return answers

    def _told(self, error: Exception) -> OpsError:
        if not self._scratch and isinstance(error, redis.RedisError):
            return self._block.refused(error)
        return VerificationFailed(f"the scratch server: {error}", "check the memory and the disk of this host")


@contextlib.contextmanager
def live_line(block: Redis) -> Iterator[RedisLine]:
    """A connection to the live server."""
    line = RedisLine(block, block.client(), scratch=False)
    try:
        yield line
    finally:
        line.close()


@contextlib.contextmanager
def scratch_line(block: Redis, client: redis.Redis) -> Iterator[RedisLine]:
    """A connection to the scratch server of `client`."""
    line = RedisLine(block, client, scratch=True)
    try:
        yield line
    finally:
        line.close()


def socket_of(client: redis.Redis) -> Path:
    """The Unix socket of a scratch server; its log is in the same directory."""
    return Path(client.connection_pool.connection_kwargs["path"])


def log_of(client: redis.Redis) -> str:
    """A scratch server's log."""
    return inside.read_text(socket_of(client).with_name("log"), "replace")
