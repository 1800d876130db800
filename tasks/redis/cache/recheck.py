"""Whether a long pass over a master may go on: the lock is held, and it is still the master."""

from __future__ import annotations

import time

from blocks.redis import Redis
from runbook.current import current_report
from runbook.errors import OpsError, Unreachable
from tasks.redis.sentinels import ask_sentinels

RECHECK_SECONDS = 1.0


class Recheck:
    """Every second of a pass: the environment's lock is held, and no Sentinel names another master."""

    def __init__(self, block: Redis, address: str) -> None:
        self._block, self._address, self._due = block, address, 0.0

    def __call__(self) -> None:
        """Raises LockLost or OpsError where that is no longer so."""
        if time.monotonic() < self._due:
            return
        if report := current_report():
            report.require_lock()
        require_master(self._block, self._address)
        self._due = time.monotonic() + RECHECK_SECONDS

    def reason(self, error: OpsError) -> OpsError:
        """Why a pass ended: a master that is replaced drops its clients."""
        if isinstance(error, Unreachable):
            try:
                require_master(self._block, self._address)
            except OpsError as replaced:
                return replaced
        return error


def require_master(block: Redis, address: str) -> None:
    """Raises OpsError where a Sentinel names another master."""
    others = {name for name in ask_sentinels(block).masters if name not in ("", address)}
    if others:
        raise OpsError(
            f"{address} is no longer the master: the Sentinels name {', '.join(sorted(others))}",
            "launch it again: it goes on there with what is left",
        )
