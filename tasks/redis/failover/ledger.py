"""Numbered test writes during a failover: which were acknowledged, by which server, and which exist afterwards."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any, cast

import redis
import redis.sentinel
from redis.connection import SSLConnection

from blocks.redis.server import Redis
from runbook.errors import OpsError
from runbook.files.marker import UnfinishedRun
from runbook.wait import until
from tasks.application.acknowledged import AcknowledgedWrites, LedgerEntry
from tasks.redis.failover.group import ANSWER_SECONDS, quick, quick_client
from tasks.redis.server import at_once

PREFIX = "ops-failover:"
MARKER = f"{PREFIX}begun"
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


@dataclass(frozen=True, kw_only=True)
class RedisFailoverMarker(UnfinishedRun):
    """The marker of a Redis failover. It is a key in Redis, not a file: it is replicated, and every host can read it.

    A completed run removes it; that of a killed run expires after an hour. `replid` is the replication ID of the old
    master: with it the next run knows whether the new master continues the same stream.
    """

    old: str
    candidate: str
    version: int = 1
    replid: str = ""

    def write_to(self, master: Redis) -> None:
        """Set the key on the master.

        Raises:
            OpsError: the master refuses it.
        """
        with quick(master) as client:
            client.set(MARKER, self.dump(), ex=KEPT_SECONDS)

    @classmethod
    def find_in(cls, master: Redis) -> RedisFailoverMarker | None:
        """The marker of an unfinished failover; None without one, or where the key cannot be read."""
        try:
            with quick(master) as client:
                text = client.get(MARKER)
            return cls.parse(cast(bytes, text)) if text else None
        except (OpsError, ValueError):
            return None

    @staticmethod
    def remove_from(master: Redis) -> None:
        """The failover is complete."""
        with quick(master) as client:
            client.unlink(MARKER)


class RedisFailoverLedger:
    """Writes numbers to a separate set continuously, as a client that finds the master by the Sentinels.

    A context manager. Attempts without an acknowledgement are not counted: they may or may not exist.
    """

    def __init__(self, block: Redis) -> None:
        self.key = f"{PREFIX}{secrets.token_hex(4)}"
        self.entries: list[LedgerEntry] = []
        self.last_error = ""
        self._client = following(block)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)

    def __enter__(self) -> RedisFailoverLedger:
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

    def wait_for(self, address: str, seconds: float) -> LedgerEntry:
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

    def account(self, master: Redis) -> AcknowledgedWrites:
        """Stop, and check every acknowledged number on the new master."""
        self.stop()
        entries = tuple(self.entries)
        with quick(master) as client:
            there = {int(number) for number in cast(set[bytes], client.smembers(self.key))}
        return AcknowledgedWrites(entries, frozenset(entry.number for entry in entries) - there)

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
                self.entries.append(LedgerEntry(number, time.monotonic(), self._server()))
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
