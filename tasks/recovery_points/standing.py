"""What is known of an environment's recoverability: one record for the board and for Prometheus.

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
from runbook.files.chain import RECORD
from runbook.guard.brief import asked_briefly
from runbook.log import logger
from tasks.backups.manifest import Kind
from tasks.recovery_points.point import Resource

FILE, VARIABLE = RECORD, "ops-recoverability-"
MOST = 200
State = Literal["red", "yellow", "green"]


@dataclass(frozen=True)
class Recoverable:
    """One resource: the newest moment that can be restored (`at`), by which `option` and `runbook`, what that loses and
    how long it takes (None: not known), since when it is `proven` ("": never). `why`: what makes it red or yellow."""

    resource: Resource
    state: State
    why: str
    at: datetime | None
    loss_seconds: float | None
    seconds: float | None
    option: str
    runbook: str
    proven: str


@dataclass(frozen=True)
class BackupAge:
    """When the newest backup of a kind was taken, and the newest that is verified; None: there is none."""

    kind: Kind
    taken: datetime | None
    verified: datetime | None


@dataclass(frozen=True)
class LastDrill:
    """The newest drill, its status, and the seconds until users were served again (None: not reached)."""

    at: datetime
    status: str
    scenario: str
    rto_seconds: float | None


@dataclass(frozen=True)
class Standing:
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


_SHAPE = TypeAdapter(Standing)


def save(reports: Path, standing: Standing) -> None:
    """Beside the reports; and for other hosts in Prefect, where it answers.

    Raises:
        OpsError: the file cannot be written.
    """
    record.write(reports / FILE, standing)
    if FlowRunContext.get():
        with _prefect():
            Variable.set(VARIABLE + standing.environment, _SHAPE.dump_json(standing).decode(), overwrite=True)


def read(reports: Path) -> Standing | None:
    """Of the environment whose reports these are; None: it was never checked, or the record is damaged."""
    try:
        return record.read(reports / FILE, Standing, "check-recovery-objectives writes it again")
    except OpsError as error:
        logger().warning("%s", error)
        return None


def read_others() -> list[Standing]:
    """Of every environment whose record is in Prefect; none where it does not answer. A record of another version of
    this project is left out until that environment is checked again."""
    found = list[Standing]()
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
    """Where it does not answer, there is the file."""
    try:
        with asked_briefly():
            yield
    except (httpx.HTTPError, PrefectException, RuntimeError, ValueError) as error:
        logger().warning("the record of recoverability is not in Prefect (%s)", type(error).__name__)
