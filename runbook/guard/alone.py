"""Runs that were launched without a Prefect server: only Prefect keeps runs of other hosts away."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from runbook.errors import Locked

OPTION = "--without-prefect"
RISK = "only this host's file lock protects the environment: a run on another host may change it at the same time"
_refusing: contextvars.ContextVar[bool] = contextvars.ContextVar("refusing_maintenance", default=False)


@contextlib.contextmanager
def refuse_maintenance() -> Iterator[None]:
    """In the block, maintenance that is confirmed is refused. Recoveries, plans, checks and backups (they only add)
    run."""
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


def require_prefect(environment: str) -> None:
    """Raises Locked where this run was launched without Prefect, and without the option that accepts the risk."""
    if _refusing.get():
        raise Locked(
            f"no Prefect server answers, and maintenance of {environment} needs its lock",
            f"start the Prefect server, or add {OPTION} and accept the risk: {RISK}",
        )
