"""The recoverability of an environment: one record for the board and for Prometheus.

`<reports>/recoverability.json`, and a Prefect Variable, which workers of other environments read for the board.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.variables import Variable
from pydantic import TypeAdapter, ValidationError

from runbook.errors import OpsError
from runbook.files import record
from runbook.guard.brief import asked_briefly
from runbook.log import logger
from tasks.backups.manifest import Kind
from tasks.recovery_points.point import Resource

FILE, VARIABLE = "recoverability.json", "ops-recoverability-"
MOST = 200
State = Literal["red", "yellow", "green"]


@dataclass(frozen=True)
class Recoverable:
    """One resource: the newest restorable time (`at`), the `option` and `runbook` for it, its loss and duration (None:
    unknown), since when it is `proven` ("": never). `why`: the reason for red or yellow. `lost`: the loss in words."""

    resource: Resource
    state: State
    why: str
    at: datetime | None
    loss_seconds: float | None
    seconds: float | None
    option: str
    runbook: str
    proven: str
    lost: str


@dataclass(frozen=True)
class BackupAge:
    """The times of the newest backup of a kind and of the newest verified one; None: there is none."""

    kind: Kind
    taken: datetime | None
    verified: datetime | None


@dataclass(frozen=True)
class LastDrill:
    """The newest drill, its status, and the seconds until users were served again (None: they were not)."""

    at: datetime
    status: str
    scenario: str
    rto_seconds: float | None


@dataclass(frozen=True)
class LastRecovery:
    """The newest recovery that was no drill, and what it measured as lost."""

    at: datetime
    status: str
    runbook: str
    lost: str


@dataclass(frozen=True)
class RecoveryStanding:
    """Of one environment, as of `checked`. `next_drill` "": none is scheduled, or Prefect did not answer."""

    environment: str
    title: str
    zone: str
    checked: datetime
    rpo_seconds: float
    rto_seconds: float
    resources: tuple[Recoverable, ...]
    backups: tuple[BackupAge, ...]
    drill: LastDrill | None
    next_drill: datetime | None
    recovery: LastRecovery | None = None


_SHAPE = TypeAdapter(RecoveryStanding)


def save(reports: Path, standing: RecoveryStanding) -> None:
    """Write it next to the reports, and to Prefect for other hosts, if that answers.

    Raises:
        OpsError: the file cannot be written.
    """
    record.write(reports / FILE, standing)
    if FlowRunContext.get():
        with _prefect():
            Variable.set(VARIABLE + standing.environment, _SHAPE.dump_json(standing).decode(), overwrite=True)


def read(reports: Path) -> RecoveryStanding | None:
    """The record of the environment with these reports; None: it was never checked, or the record is damaged."""
    try:
        return record.read(reports / FILE, RecoveryStanding, "run check-recovery-objectives, which writes it again")
    except OpsError as error:
        logger().warning("%s", error)
        return None


def read_others() -> list[RecoveryStanding]:
    """The records of all environments in Prefect; none if it does not answer. A record of another version of this
    project is left out until that environment is checked again."""
    found = list[RecoveryStanding]()
    if not FlowRunContext.get():
        return found
    with _prefect(), get_client(sync_client=True) as client:
        wanted = {"variables": {"name": {"like_": VARIABLE}}, "limit": MOST}
        for one in client.request("POST", "/variables/filter", json=wanted).json():
            with contextlib.suppress(ValidationError):
                found.append(_SHAPE.validate_json(one["value"]))
    return found


@contextlib.contextmanager
def _prefect() -> Iterator[None]:
    """If Prefect does not answer, the file remains."""
    try:
        with asked_briefly():
            yield
    except (httpx.HTTPError, PrefectException, RuntimeError, ValueError) as error:
        logger().warning("the record of recoverability is not in Prefect (%s)", type(error).__name__)
