"""Whether this user may give commands, found out without giving one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError


def find_refused(client: redis.Redis, block: Redis, *commands: Sequence[str]) -> list[OpsError]:
    """Which of these commands the server refuses this user. They are queued in a transaction that is thrown away with
    its connection: none is carried out. Where MULTI itself is refused nobody knows, and none is named.

    Raises:
        redis.ConnectionError: it went away.
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
