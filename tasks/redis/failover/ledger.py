"""Numbered test writes during a failover: which were acknowledged, by which server, and which exist afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import redis
import redis.sentinel
from redis.connection import SSLConnection

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.wait import until
from tasks.application.acknowledged import Account, Entry
from tasks.redis.failover.group import ANSWER_SECONDS, quick, quick_client
from tasks.redis.server import at_once

PREFIX = "ops-failover:"
BEGUN = f"{PREFIX}begun"
KEPT_SECONDS = 3600
GAP_SECONDS = 0.005
_OPTIONS = (
    "username",
    "password",
    "client_name",
    "retry",
    "protocol",
    "legacy_responses",
    "socket_timeout",
    "socket_connect_timeout",
)


@dataclass(frozen=True)
class Begun:
    """The marker of a run's failover. It is stored in Redis, so that it moves with the data and every host sees it.

    It is deleted when the run succeeds; a killed run's marker expires after an hour.
    """

    old: str
    candidate: str
    started: str
    run: str
    version: int = 1
    replid: str = ""
    """The old master's stream, by which the next run knows whether all of it was replicated."""

    @classmethod
    def now(cls, old: str, candidate: str, replid: str) -> Begun:
        """By this process."""
        run = f"process {os.getpid()} on {socket.gethostname()}"
        return cls(old, candidate, datetime.now(UTC).isoformat(timespec="seconds"), run, replid=replid)


def remember(master: Redis, begun: Begun) -> None:
    """Write the marker to the master.

    Raises:
        OpsError: it cannot be written.
    """
    with quick(master) as client:
        client.set(BEGUN, json.dumps(asdict(begun)), ex=KEPT_SECONDS)


def find_begun(master: Redis) -> Begun | None:
    """The marker of an incomplete run; None: there is none (or it may not be read)."""
    try:
        with quick(master) as client:
            text = client.get(BEGUN)
        return Begun(**json.loads(cast(bytes, text))) if text else None
    except (OpsError, ValueError, TypeError):
        return None


def forget(master: Redis) -> None:
    """Delete the marker."""
    with quick(master) as client:
        client.unlink(BEGUN)


class Ledger:
    """Writes numbers to a separate set continuously, as a client that finds the master by the Sentinels.

    A context manager. Attempts without an acknowledgement are not counted: they may or may not exist.
    """

    def __init__(self, block: Redis) -> None:
        self.key = f"{PREFIX}{secrets.token_hex(4)}"
        self.entries: list[Entry] = []
        self.last_error = ""
        self._client = following(block)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)

    def __enter__(self) -> Ledger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        with contextlib.suppress(redis.RedisError):
            self._client.unlink(self.key)
        self._client.close()

    def stop(self) -> None:
        """No more writes."""
        self._stop.set()
        self._thread.join(2 * ANSWER_SECONDS)

    def wait_for(self, address: str, seconds: float) -> Entry:
        """Wait for the first write that this server acknowledges.

        Raises:
            Unreachable: there was none in time.
        """
        found = until(
            lambda: next((entry for entry in self.entries if entry.server == address), None),
            what=f"a write that {address} acknowledges to a client of the Sentinels ({self.last_error or 'no error'})",
            seconds=seconds,
            every_seconds=0.005,
            hint="check the clients' errors: READONLY, NOREPLICAS (min-replicas-to-write), OOM",
        )
        assert found
        return found

    def account(self, master: Redis) -> Account:
        """Stop, and check every acknowledged number on the new master."""
        self.stop()
        entries = tuple(self.entries)
        with quick(master) as client:
            there = {int(number) for number in cast(set[bytes], client.smembers(self.key))}
        return Account(entries, frozenset(entry.number for entry in entries) - there)

    def _write(self) -> None:
        number = 0
        while not self._stop.wait(GAP_SECONDS):
            number += 1
            try:
                if self.entries:
                    self._client.sadd(self.key, number)
                else:  # never without its end
                    with self._client.pipeline(transaction=True) as pipe:
                        pipe.sadd(self.key, number)
                        pipe.expire(self.key, KEPT_SECONDS)
                        pipe.execute()
                self.entries.append(Entry(number, time.monotonic(), self._server()))
            except redis.RedisError as error:
                self.last_error = f"{type(error).__name__}: {error}"[:200]

    def _server(self) -> str:
        host, port = cast(Any, self._client.connection_pool).master_address
        return f"{host}:{port}"


def following(block: Redis) -> redis.Redis:
    """A client like the application's: it finds the master by the Sentinels at each connection."""
    pool = quick_client(block).connection_pool
    known = pool.connection_kwargs
    options = {name: value for name, value in known.items() if name in _OPTIONS or name.startswith("ssl")}
    if issubclass(pool.connection_class, SSLConnection):
        options["ssl"] = True
    sentinel = cast(Any, redis.sentinel.Sentinel)([])
    sentinel.sentinels = [quick_client_of(block, address) for address in block.sentinels]
    client = sentinel.master_for(block.sentinel_master, **options)
    return cast(redis.Redis, client)


def quick_client_of(block: Redis, address: str) -> redis.Redis:
    """A client of one Sentinel with a short timeout."""
    client = at_once(block.sentinel(address))
    client.connection_pool.connection_kwargs.update(socket_timeout=1.0, socket_connect_timeout=1.0)
    return client
