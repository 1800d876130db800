"""The demonstration's second client: it writes to Redis, and knows afterwards which acknowledged writes are lost.

Each write is a key that carries its id in the ledger, and expires after a day.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.drill.ledger import WriteAttempt, WriteLedger

KIND = "redis set"
PREFIX = "demo:write:"
TTL_SECONDS = 86_400


@dataclass(frozen=True)
class RedisLoss:
    """`lost`: acknowledged writes that are missing now. `backup_alone`: those acknowledged after the backup's snapshot,
    which it cannot have."""

    acknowledged: int
    lost: tuple[WriteAttempt, ...]
    backup_alone: int

    @property
    def sentence(self) -> str:
        """For people."""
        return (
            f"{len(self.lost)} of {self.acknowledged} acknowledged writes (the client's ledger); the backup alone "
            f"would have lost {self.backup_alone}"
        )


class RedisWriter:
    """Writes from its own thread while the block runs. A write without an answer is not acknowledged."""

    def __init__(self, url: Callable[[], str], path: Path, per_second: float) -> None:
        self.ledger = WriteLedger(path)
        self._url, self._pause = url, 1 / per_second
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="redis writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.ledger.close()

    def loss(self, snapshot: datetime) -> RedisLoss:
        """Look up every acknowledged write on the server that is the master now. `snapshot`: the backup's.

        Raises:
            redis.RedisError: it does not answer.
        """
        acknowledged = self.ledger.acknowledged()
        with _client(self._url()) as client:
            found = client.mget([PREFIX + attempt.id for attempt in acknowledged]) if acknowledged else []
        lost = [one for one, value in zip(acknowledged, found, strict=True) if value != one.id.encode()]
        return RedisLoss(len(acknowledged), tuple(lost), len(self.ledger.acknowledged(after=snapshot)))

    def _work(self) -> None:
        with _client(self._url()) as client:
            while not self._stop.wait(self._pause):
                attempt = self.ledger.intend(KIND)
                try:
                    client.set(PREFIX + attempt, attempt, ex=TTL_SECONDS)
                except redis.RedisError as error:
                    self.ledger.answer(attempt, "indeterminate", why=str(error))
                else:
                    self.ledger.answer(attempt, "acknowledged", key=PREFIX + attempt)


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=10, retry=Retry(NoBackoff(), 0))
