"""One connection to one server, in which databases are chosen: what is read and written key by key goes through it.

A client of redis-py takes any connection of its pool, so that neither SELECT nor CLIENT TRACKING … NOLOOP can be relied
on there; and its pipelines raise at the first answer that is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError, VerificationFailed

Command = Sequence[object]
TRANSACTION = 2
"""MULTI and EXEC around the commands."""


class Line:
    """A connection. Every error of it is raised as what `block.refused` makes of it."""

    def __init__(self, block: Redis, client: redis.Redis, *, scratch: bool) -> None:
        pool = client.connection_pool
        self._block, self._scratch = block, scratch
        # Plain answers: RESP3 and its notices of maintenance would put messages between them.
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
        """Several commands in one round trip; the errors of single ones are among the answers. `together`: nothing of
        anybody else's happens between them.

        Raises:
            Unreachable: the connection broke. What was sent may have been done.
            OpsError: this user may not do it, or the database is not there.
        """
        if not commands:
            return []
        wanted: list[Command] = [] if database == self._database else [("SELECT", database)]
        chosen = len(wanted)
        self._database = -1  # whatever happens now, it is chosen again
        wanted += [("MULTI",), *commands, ("EXEC",)] if together else commands
        answers = self._talk(wanted)
        for answer in (*answers[:chosen], *(answers[-1:] if together else ())):
            if isinstance(answer, Exception):
                raise self._told(answer)
        self._database = database
        return cast(list[Any], answers[-1]) if together else answers[chosen:]

    def subscribe(self, *channels: bytes) -> None:
        """Listen to channels from now on: such a connection takes no other command."""
        self._database = -1
        self.refuse(self._talk([("SUBSCRIBE", channel) for channel in channels]))

    def listen(self) -> Any:
        """The next message of a connection that subscribed to something; waits for it."""
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
        """End it."""
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
def live_line(block: Redis) -> Iterator[Line]:
    """To the live server."""
    line = Line(block, block.client(), scratch=False)
    try:
        yield line
    finally:
        line.close()


@contextlib.contextmanager
def scratch_line(block: Redis, client: redis.Redis) -> Iterator[Line]:
    """To the scratch server that `client` talks to."""
    line = Line(block, client, scratch=True)
    try:
        yield line
    finally:
        line.close()


def socket_of(client: redis.Redis) -> Path:
    """The Unix socket of a scratch server; its log lies beside."""
    return Path(client.connection_pool.connection_kwargs["path"])


def log_of(client: redis.Redis) -> str:
    """What a scratch server wrote into its log so far."""
    return socket_of(client).with_name("log").read_text(errors="replace")
