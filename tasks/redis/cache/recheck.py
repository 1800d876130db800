"""Whether a long pass over a master may go on: the lock is held, it is the same server, and the master still."""

from __future__ import annotations

import time

import redis

from blocks.redis.server import Redis
from runbook.current import current_report
from runbook.errors import OpsError, Unreachable
from tasks.redis.cache.server import CacheServer, require_same
from tasks.redis.sentinels import require_master

RECHECK_SECONDS = 1.0


class Recheck:
    """Every second of a pass: the environment's lock is held, the server was neither restarted nor demoted, and the
    Sentinels vouch for it (`waived`: they need not; none may name another)."""

    def __init__(self, block: Redis, client: redis.Redis, server: CacheServer, *, waived: bool) -> None:
        self._block, self._client, self._server, self._waived = block, client, server, waived
        self._due = 0.0

    def __call__(self) -> None:
        """Raises LockLost or OpsError where that is no longer so."""
        if time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        """The same, whenever it was looked at last."""
        if report := current_report():
            report.require_lock()
        require_same(self._client, self._server)
        require_master(self._block, self._server.address, waived=self._waived)
        self._due = time.monotonic() + RECHECK_SECONDS


def reason(block: Redis, address: str, error: OpsError) -> OpsError:
    """Why a pass ended: a master that is replaced drops its clients."""
    if isinstance(error, Unreachable):
        try:
            require_master(block, address, waived=True)
        except OpsError as replaced:
            return replaced
    return error
