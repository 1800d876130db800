"""Whether this user may run commands, without running them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError


def find_refused(client: redis.Redis, block: Redis, *commands: Sequence[str]) -> list[OpsError]:
    """The commands that the server refuses this user. They are queued in a transaction that is discarded with its
    connection, so none is executed. If MULTI itself is refused, the result is empty.

    Raises:
        redis.ConnectionError: the connection broke.
    """
    connection = cast(Any, client.connection_pool.get_connection())

    def refusal(words: Sequence[str]) -> redis.ResponseError | None:
        connection.send_command(*words)
        try:
            connection.read_response()
        except redis.ResponseError as error:
            return error
        return None

    try:
        if refusal(("MULTI",)):
            return []
        return [block.refused(error) for error in map(refusal, commands) if error]
    finally:
        connection.disconnect()
        client.connection_pool.release(connection)
