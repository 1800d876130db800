"""What a server says of itself, and the calls that every module here makes of it."""

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
"""A server that is there answers its first PING sooner: what hangs, or speaks no TLS, is told soon."""


def call(client: redis.Redis, *words: object) -> Any:
    """Any command: one place for redis-py's untyped `execute_command`."""
    return cast(Any, client).execute_command(*words)


def at_once(client: redis.Redis) -> redis.Redis:
    """The same client without redis-py's own retries (seconds each): a probe is retried as a whole, or not at all."""
    client.set_retry(Retry(NoBackoff(), 0))
    return client


@contextlib.contextmanager
def connected(block: Redis) -> Iterator[redis.Redis]:
    """A client of the live server that answers: at once when it is greeted, and in SOCKET_SECONDS from then on.

    Raises:
        Unreachable: nobody answers, or it is still loading its data.
        OpsError: it refuses (password, rights); one clear sentence.
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
    """Wait so long for answers from here on, over the connection that is open and over those to come."""
    pool = client.connection_pool
    pool.connection_kwargs["socket_timeout"] = seconds
    connection = cast(Any, pool.get_connection())
    connection.socket_timeout = seconds
    connection.update_current_socket_timeout(-1)  # to what it says now
    pool.release(connection)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """PING is refused by a server that takes no writes after a failed save, and to a user who may not: it is there."""
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
    """One run of a server, and how many bytes of writes it has counted for replicas."""

    run_id: str
    offset: int


def read_progress(block: Redis) -> Progress:
    """Where a plan begins: `run_id` is another one after each start. No step, and not retried: a server that is down is
    pinned as that.

    Raises:
        OpsError: the server does not answer or refuses.
    """
    with connected(block) as client:
        return Progress(str(client.info("server")["run_id"]), int(client.info("replication")["master_repl_offset"]))


def program_version(block: Redis) -> str:
    """The version of the server program, in the form of `version_of`.

    Raises:
        OpsError: it is not installed, or does not say.
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
    """Database → (keys, keys with a TTL), as INFO keyspace counts them: expired ones that lie there still included."""
    return {
        int(name.removeprefix("db")): (int(found["keys"]), int(found["expires"]))
        for name, found in client.info("keyspace").items()
    }


def setting(client: redis.Redis, name: str) -> str:
    """CONFIG GET of one setting, "" where the server does not know it."""
    found = client.config_get(name)
    return str(next(iter(found.values()))) if found else ""


def loaded_keys(client: redis.Redis) -> int:
    """How many keys the server read from its RDB (or AOF base) when it started; no later write changes that number.

    -1 where the server does not say.
    """
    info = client.info("persistence")
    if "rdb_last_load_keys_loaded" not in info:
        return -1
    return int(info["rdb_last_load_keys_loaded"]) + int(info["rdb_last_load_keys_expired"])


def live_directory(block: Redis) -> Path:
    """The data directory itself, where the configured path is a symbolic link to it."""
    return Path(block.data_directory).resolve()


def holders(block: Redis, directory: Path) -> list[int]:
    """Server processes that work in a directory (a server changes into its `dir`), also where it was removed under
    them. A shell that stands in it holds nothing up."""
    program = Path(block.server_program).name
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(word in process.name() for word in ("redis", "valkey", program)):
                where = process.cwd().removesuffix(" (deleted)")
                if where == str(directory) or where.startswith(f"{directory}/"):
                    found.append(process.pid)
    return found


def answers(block: Redis) -> bool:
    """Whether anybody listens where the live server does, whatever it says."""
    try:
        socket.create_connection((block.host, block.port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
