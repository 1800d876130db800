"""An application's client that writes all the time, and its own account of what was acknowledged."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any, cast

import redis
import redis.sentinel

from runbook.wait import until
from tests.redis.servers import MASTER, PASSWORD, Group, RedisServer

KEY = "acknowledged"
PACE_SECONDS, REST_SECONDS = 0.001, 0.005
"""Between two writes (without a pause it would use a processor of its own), and after a refused one."""


class Writer:
    """A context manager; it asks the group's Sentinels for the master, by redis-py's own means.

    `acknowledged`: number → when (time.time()). Every attempt has a number of its own; one that was not acknowledged
    may be there or not.
    """

    def __init__(self, group: Group) -> None:
        addresses = [("127.0.0.1", sentinel.port) for sentinel in group.sentinels]
        manager = cast(Any, redis.sentinel.Sentinel)(addresses, socket_timeout=1)
        self.client = cast(redis.Redis, manager.master_for(MASTER, password=PASSWORD, socket_timeout=2))
        self.acknowledged: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        self.wait(50)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No more writes."""
        self._stop.set()
        self._thread.join()

    def wait(self, more: int) -> None:
        """Until so many more were acknowledged."""
        target = len(self.acknowledged) + more
        until(lambda: len(self.acknowledged) >= target, what="acknowledged writes", seconds=120)

    def lost(self, master: RedisServer) -> set[int]:
        """What was acknowledged and is not there."""
        there = {int(number) for number in cast(set[bytes], master.client().smembers(KEY))}
        return set(self.acknowledged) - there

    def longest_gap(self) -> float:
        """Seconds between two acknowledged writes, the longest."""
        moments = list(self.acknowledged.values())
        return max(after - before for before, after in itertools.pairwise(moments))

    def _write(self) -> None:
        number = 0
        while not self._stop.wait(PACE_SECONDS):
            number += 1
            try:
                self.client.sadd(KEY, number)
                self.acknowledged[number] = time.time()
            except redis.RedisError:
                self._stop.wait(REST_SECONDS)
