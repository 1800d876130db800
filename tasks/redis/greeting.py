"""Try a client's first commands: PING, a write that changes nothing, and INFO about the server's start."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import redis

from blocks.redis.refusals import FULL
from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.host.ports import read_reach
from tasks.redis.server import GREETING_SECONDS, at_once, call

State = Literal[
    "well",
    "closed",
    "unreachable",
    "unknown name",
    "hangs",
    "password",
    "forbidden",
    "loading",
    "full",
    "no memory",
    "cannot save",
    "replica",
    "no master",
    "no replicas",
    "other",
]


@dataclass(frozen=True)
class RedisGreeting:
    """Redis's answer to a command; `meaning` explains it and names the next step."""

    state: State
    said: str
    meaning: OpsError | None = None


@probe
def read_answer(block: Redis, *, writes: bool = False) -> RedisGreeting:
    """PING; with `writes` also SET … XX of a missing key, which is checked like any write and changes nothing."""
    reach = read_reach.work(block.host, block.port)
    if reach.state != "open":
        return RedisGreeting(reach.state, reach.detail)
    client = at_once(block.client(answer_seconds=GREETING_SECONDS))
    words = ("SET", f"ops:diagnose:{uuid.uuid4()}", "1", "XX") if writes else ("PING",)
    try:
        call(client, *words)
        return RedisGreeting("well", "nothing was changed" if writes else "PONG")
    except redis.RedisError as error:
        return RedisGreeting(_state(error), str(error), block.refused(error))
    finally:
        client.close()


def _state(error: redis.RedisError) -> State:
    said = str(error)
    if FULL in said:
        return "full"
    if said.startswith("MISCONF"):
        return "cannot save"
    if said.startswith("NOREPLICAS"):
        return "no replicas"
    for kind, state in _KINDS:
        if isinstance(error, kind):
            return state
    return "other"


_KINDS: tuple[tuple[type[redis.RedisError], State], ...] = (
    (redis.exceptions.AuthenticationError, "password"),
    (redis.exceptions.AuthorizationError, "password"),
    (redis.exceptions.NoPermissionError, "forbidden"),
    (redis.exceptions.ReadOnlyError, "replica"),
    (redis.exceptions.BusyLoadingError, "loading"),
    (redis.exceptions.MasterDownError, "no master"),
    (redis.exceptions.OutOfMemoryError, "no memory"),
    (redis.TimeoutError, "hangs"),
)


@dataclass(frozen=True)
class RedisUptime:
    """`loaded_keys`: those that it loaded at its start, -1: unknown. `loading_seconds`: how long it needs yet, by its
    own estimate; 0: it is not loading."""

    seconds: float
    loaded_keys: int
    loading_seconds: float


@probe
def read_uptime(block: Redis) -> RedisUptime:
    """INFO server and persistence, which a server that is loading answers too.

    Raises:
        Unreachable, OpsError: it does not answer or refuses.
    """
    server, persistence = _info(block, "server", "persistence")
    loaded = int(persistence.get("rdb_last_load_keys_loaded", -1))
    eta = float(persistence.get("loading_eta_seconds", 0)) if persistence.get("loading") else 0.0
    return RedisUptime(float(server["uptime_in_seconds"]), loaded, eta)


@probe
def is_master(block: Redis) -> bool:
    """INFO replication.

    Raises:
        Unreachable, OpsError: it does not answer or refuses.
    """
    (replication,) = _info(block, "replication")
    return bool(replication["role"] == "master")


def _info(block: Redis, *sections: str) -> list[dict[str, Any]]:
    with contextlib.closing(at_once(block.client(answer_seconds=GREETING_SECONDS))) as client:
        try:
            return [client.info(section) for section in sections]
        except redis.RedisError as error:
            raise block.refused(error) from None
