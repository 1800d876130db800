"""A pause of a master's writes, which ends soon after its run.

https://valkey.io/commands/client-pause/
"""

from __future__ import annotations

import contextlib
import threading
import time

import redis

from blocks.redis.server import Redis
from runbook.errors import OpsError
from tasks.redis.failover.group import ANSWER_SECONDS, quick, quick_client
from tasks.redis.server import call

LONGEST_SECONDS = 10.0
RENEWALS = 4


class Pause:
    """CLIENT PAUSE … WRITE on a master, renewed by a thread. A context manager.

    If its run is killed, writes are paused for at most `seconds`. That must be less than the Sentinels' down-after
    time: the pause also blocks their PUBLISH, so they see a master that is paused for longer as down.

    After an error the pause is lifted, unless a failover may still promote a replica (`keep`): then the old master must
    refuse writes until it is a replica, and the pause expires.
    """

    def __init__(self, block: Redis, seconds: float) -> None:
        self.keep = False
        self.began = 0.0
        self._block, self._client = block, quick_client(block)
        self._seconds, self._ends, self._gap = seconds, 0.0, False
        self._stop, self._sending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="pause", daemon=True)

    def __enter__(self) -> Pause:
        self.began = time.monotonic()
        self.hold(self._seconds)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and not self.keep:
            with contextlib.suppress(OpsError):
                self.lift()
        self._end()
        self._client.close()

    @property
    def unbroken(self) -> bool:
        """Whether writes were paused without a gap until now."""
        return not self._gap and time.monotonic() < self._ends

    def hold(self, seconds: float) -> None:
        """From now on for so long after the last renewal.

        Raises:
            OpsError: the server refuses, or does not answer.
        """
        self._seconds = seconds
        try:
            self._send()
        except redis.RedisError as error:
            raise self._block.refused(error) from None

    def lift(self) -> None:
        """CLIENT UNPAUSE on a separate connection: the Sentinels may have closed the other."""
        self._end()
        with quick(self._block) as client:
            call(client, "CLIENT", "UNPAUSE")

    def _end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * ANSWER_SECONDS)

    def _send(self) -> None:
        with self._sending:
            sent = time.monotonic()
            call(self._client, "CLIENT", "PAUSE", int(self._seconds * 1000), "WRITE")
            self._gap |= bool(self._ends) and time.monotonic() > self._ends
            self._ends = max(self._ends, sent + self._seconds)

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / RENEWALS):
            with contextlib.suppress(redis.RedisError):
                if self._client.info("replication")["role"] != "master":
                    return
                self._send()
