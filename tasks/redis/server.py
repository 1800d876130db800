"""Connections to a Redis server, and its basic facts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from blocks.redis.server import SOCKET_SECONDS, Redis
from runbook import shell
from runbook.errors import OpsError

LOAD_SECONDS = 1800.0
CONNECT_SECONDS = 3.0
GREETING_SECONDS = 5.0
"""A healthy server answers its first PING sooner, so a hanging server or wrong TLS is reported soon."""


def call(client: redis.Redis, *words: object) -> Any:
    """Any command: one place for redis-py's untyped `execute_command`."""
    return cast(Any, client).execute_command(*words)


def at_once(client: redis.Redis) -> redis.Redis:
    """The same client without redis-py's own retries (seconds each): a probe is retried as a whole, or not at all."""
    client.set_retry(Retry(NoBackoff(), 0))
    return client


@contextlib.contextmanager
def connected(block: Redis) -> Iterator[redis.Redis]:
    """A connected client. The first answer must come within GREETING_SECONDS, later ones within SOCKET_SECONDS.

    Raises:
        Unreachable: the server does not answer, or is still loading its data.
        OpsError: it refuses (password, rights).
    """
    client = at_once(block.client(answer_seconds=GREETING_SECONDS))
    try:
        with _readable():
            client.ping()
        _be_patient(client, SOCKET_SECONDS)
        yield client
    except redis.RedisError as error:
        raise block.refused(error) from None
    finally:
        client.close()


def _be_patient(client: redis.Redis, seconds: float) -> None:
    """Wait that long for answers from now on, on the open connection and on later ones."""
    pool = client.connection_pool
    pool.connection_kwargs["socket_timeout"] = seconds
    connection = cast(Any, pool.get_connection())
    connection.socket_timeout = seconds
    connection.update_current_socket_timeout(-1)  # to the connection's own value
    pool.release(connection)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Accept a refused PING: a server refuses it after a failed save, or for a user without that right, but it
    answers."""
    try:
        yield
    except redis.exceptions.NoPermissionError:
        pass
    except redis.ResponseError as error:
        if not str(error).startswith("MISCONF"):
            raise


def version_of(client: redis.Redis) -> str:
    """`valkey 9.1.2` or `redis 8.0.2` (https://valkey.io/commands/info/)."""
    info = client.info("server")
    if info.get("server_name") == "valkey":
        return f"valkey {info['valkey_version']}"
    return f"redis {info['redis_version']}"


@dataclass(frozen=True)
class Progress:
    """A server's run id, and its replication offset in bytes."""

    run_id: str
    offset: int


def read_progress(block: Redis) -> Progress:
    """The server's state for a plan. `run_id` changes with each start. It is not retried: a plan also pins that a
    server is down.

    Raises:
        OpsError: the server does not answer or refuses.
    """
    with connected(block) as client:
        return Progress(str(client.info("server")["run_id"]), int(client.info("replication")["master_repl_offset"]))


def program_version(block: Redis) -> str:
    """The version of the server program, in the form of `version_of`.

    Raises:
        OpsError: it is not installed, or prints no version.
    """
    printed = shell.run([block.server_program, "--version"], timeout_seconds=20).stdout
    words = printed.split()
    number = next((word.removeprefix("v=") for word in words if word.startswith("v=")), "")
    if not number:
        raise OpsError(f"{block.server_program} does not print its version", "correct [redis] server_program")
    return f"{words[0].lower()} {number}"


def family(version: str) -> str:
    """`valkey` or `redis`."""
    return version.split(" ", 1)[0]


def key_counts(client: redis.Redis) -> dict[int, tuple[int, int]]:
    """Database → (keys, keys with a TTL) by INFO keyspace, including expired keys that are not deleted yet."""
    return {
        int(name.removeprefix("db")): (int(found["keys"]), int(found["expires"]))
        for name, found in client.info("keyspace").items()
    }


def setting(client: redis.Redis, name: str) -> str:
    """CONFIG GET of one setting; "": the server does not know it."""
    found = client.config_get(name)
    return str(next(iter(found.values()))) if found else ""


def loaded_keys(client: redis.Redis) -> int:
    """How many keys the server loaded from its RDB (or AOF base) at its start; -1: unknown."""
    info = client.info("persistence")
    if "rdb_last_load_keys_loaded" not in info:
        return -1
    return int(info["rdb_last_load_keys_loaded"]) + int(info["rdb_last_load_keys_expired"])


def live_directory(block: Redis) -> Path:
    """The data directory, with symbolic links resolved."""
    return Path(block.data_directory).resolve()


def holders(block: Redis, directory: Path) -> list[int]:
    """Server processes whose working directory this is (a server changes into its `dir`). Other programs, such as a
    shell, do not count; nor do servers whose directory was deleted: they cannot write into one of the same name."""
    program = Path(block.server_program).name
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(word in process.name() for word in ("redis", "valkey", program)):
                where = Path(f"/proc/{process.pid}/cwd").readlink()  # psutil hides that it was deleted
                if where.is_relative_to(directory):
                    found.append(process.pid)
    return found


def answers(block: Redis) -> bool:
    """Whether a process listens on the server's port."""
    try:
        socket.create_connection((block.host, block.port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
