"""Pages of work so small that nobody notices.

A page takes the server no longer than another client's slowest answers take anyway: the server serves whoever waits
between two pages, so that such a client waits for one page at most, and twice as long as its slowest calls take idle.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

import redis

from tasks.redis.server import call

FIRST_PAGE_KEYS = 10
LEAST_PAGE_KEYS, MOST_PAGE_KEYS = 10, 1000
LEAST_PAGE_SECONDS, MOST_PAGE_SECONDS = 0.00015, 0.001
EMPTY_CALLS = 300
# Of another client's slowest calls: the rest is for what a page costs beside the server's work.
PAGE_SHARE = 0.7
LEAST_WORK_SECONDS = 0.00001
# Where most of the last pages waited so long, others have much for the server to do: they are left alone as long.
CROWDED_SECONDS = 0.002
LAST_PAGES = 9
MOST_REST_SECONDS = 0.02


class Pace:
    """How many keys a page may have, from how long the last ones took."""

    def __init__(self, idle_seconds: float, page_seconds: float) -> None:
        self.count = FIRST_PAGE_KEYS
        self.page_seconds = page_seconds
        self.longest_seconds = self.longest_worked_seconds = 0.0
        self._idle_seconds = idle_seconds
        self._seconds_per_key: deque[float] = deque(maxlen=LAST_PAGES)
        self._waits: deque[float] = deque([0.0] * LAST_PAGES, maxlen=LAST_PAGES)

    def took(self, seconds: float, worked_seconds: float) -> None:
        """A page of `count` keys took so long there and back, and so much of the server (0 where nobody knows)."""
        self.longest_seconds = max(self.longest_seconds, seconds)
        self.longest_worked_seconds = max(self.longest_worked_seconds, worked_seconds)
        work = worked_seconds or seconds - self._idle_seconds
        self._seconds_per_key.append(max(work, LEAST_WORK_SECONDS) / self.count)
        wanted = self.page_seconds / statistics.median(self._seconds_per_key)
        self.count = int(max(LEAST_PAGE_KEYS, min(wanted, 2 * self.count, MOST_PAGE_KEYS)))
        self._waits.append(seconds - self._idle_seconds - worked_seconds if worked_seconds else 0.0)

    def rest(self) -> None:
        """Leave the server to the others for a while: no condition is waited for."""
        waited = statistics.median(self._waits)
        if waited > CROWDED_SECONDS:
            time.sleep(min(waited, MOST_REST_SECONDS))


def measure_idle(client: redis.Redis) -> tuple[float, float]:
    """An empty call's usual round trip, and how long a page may take: less than the slowest of a hundred of them."""
    times = []
    for _ in range(EMPTY_CALLS):
        started = time.perf_counter()
        call(client, "SELECT", 0)  # a PING is refused where the last save failed
        times.append(time.perf_counter() - started)
    slow = statistics.quantiles(times, n=100)[98] * PAGE_SHARE
    return statistics.median(times), min(max(slow, LEAST_PAGE_SECONDS), MOST_PAGE_SECONDS)
