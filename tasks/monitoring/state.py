"""The state of an environment's monitoring, in `<reports>/metrics/state.json`. Two workers take turns by its lock. It
is durable: an event is sent even if the watcher is killed in between."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from runbook.errors import OpsError
from runbook.files import durable, record
from runbook.log import logger
from tasks.logs.figures.spending import FileUse
from tasks.monitoring.hysteresis import AlarmState

MOST_UNSENT = 1000
_HINT = "delete it: the monitoring starts again"


@dataclass
class MonitoringState:
    """`unsent` events are told at the next round, in their order, until Prefect has taken them. `told`: when a metric's
    state was told last. `processors`: counters of a host's (tasks/host/load.py). `logs`: tokens in files that were
    read. `watching`: when Prefect took it last that somebody watches."""

    at: datetime | None = None
    host: str = ""
    standings: dict[str, AlarmState] = field(default_factory=dict)
    unsent: list[dict[str, Any]] = field(default_factory=list)
    told: dict[str, datetime] = field(default_factory=dict)
    processors: tuple[str, float, float] = ("", 0.0, 0.0)
    logs: dict[str, FileUse] = field(default_factory=dict)
    spent: tuple[datetime, float, str] | None = None
    dropped: int = 0
    watching: datetime | None = None


def directory_of(reports: Path) -> Path:
    """The directory of the state and the history."""
    return reports / "metrics"


@contextlib.contextmanager
def locked(reports: Path) -> Iterator[None]:
    """Hold the lock: no other worker takes a round.

    Raises:
        OpsError: the directory cannot be written.
    """
    directory = directory_of(reports)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = durable.open_lock(directory / ".state.lock")
    except OSError as error:
        hint = "correct its owner, or free disk space"
        raise OpsError(f"{directory} cannot be written: {error.strerror}", hint) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(reports: Path) -> MonitoringState:
    """The state. A damaged one is replaced: an alarm is raised some minutes later."""
    try:
        return record.read(directory_of(reports) / "state.json", MonitoringState, _HINT) or MonitoringState()
    except OpsError as error:
        logger().warning("%s: the monitoring starts again", error.message)
        return MonitoringState()


def save(reports: Path, state: MonitoringState) -> None:
    """Write the state to disk.

    Raises:
        OpsError: it cannot be written.
    """
    left_out = max(len(state.unsent) - MOST_UNSENT, 0)
    state.unsent, state.dropped = state.unsent[left_out:], state.dropped + left_out
    record.write(directory_of(reports) / "state.json", state)
