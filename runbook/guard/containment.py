"""A contained environment: an incident is under investigation, and maintenance is refused until it is released.

Recorded in a file in the reports directory, so that it is valid without a Prefect server, and in a Prefect Variable for
other hosts. Backups (they only add) and recoveries continue. Runs that delete or change are refused at their start and
before every irreversible act.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prefect.context import FlowRunContext
from prefect.variables import Variable
from pydantic import TypeAdapter, ValidationError

from runbook.errors import Locked, OpsError, Unreachable
from runbook.files import record
from runbook.guard.brief import answered

_HINT = "check the file: it marks the environment as contained. Delete it only if the environment is not contained"


@dataclass(frozen=True)
class Restriction:
    """One thing that the containment changed, and its state before ("" if there was none)."""

    kind: str
    target: str
    before: str = ""


@dataclass(frozen=True)
class Contained:
    """Who contained an environment, why and since when (`began`: in seconds since 1970), the restrictions, and when it
    was released ("": it is contained)."""

    id: str
    began: float
    by: str
    reason: str
    since: str
    host: str
    held: tuple[Restriction, ...] = ()
    released: str = ""

    @property
    def text(self) -> str:
        """`contained by NAME on HOST since TIME: REASON`."""
        return f"contained by {self.by} on {self.host} since {self.since}: {self.reason}"

    def refusal(self, environment: str) -> OpsError:
        """The error with which maintenance is refused."""
        hint = f"when the incident is over, run release-containment with confirm={environment}; recoveries are allowed"
        return Locked(f"{environment} is {self.text}", hint)


def read(environment: str, directory: Path, *, asks: bool = True) -> Contained | None:
    """The containment that is in force, from this host's file and, in a Prefect run, from the Variable. `asks=False`:
    Prefect is known not to answer.

    The two are synchronised: the file of a containment that was released on another host is deleted; one that only this
    host, or only Prefect, knows is copied to the other.

    Raises:
        OpsError: the file cannot be read. Nothing may be changed then.
    """
    here = record.read(_path(environment, directory), Contained, _HINT)
    there = _published(environment) if asks else None
    if here and there and (there.released if there.id == here.id else there.began > here.began):
        _path(environment, directory).unlink(missing_ok=True)
        here = None
    if here and there != here and asks:
        _publish(environment, here)
    if there and not here and not there.released:
        with contextlib.suppress(OpsError):  # for this host's programs that do not query Prefect: `is_here`
            record.write(_path(environment, directory), there)
    return here or (there if there and not there.released else None)


def is_here(environment: str, directory: Path) -> bool:
    """Whether this host's file exists: for programs outside of a Prefect run."""
    return _path(environment, directory).exists()


def write(environment: str, directory: Path, contained: Contained) -> None:
    """Record a containment before anything changes: if the run is killed, the next one can continue or release.

    Raises:
        OpsError: it cannot be written. Nothing may be changed then.
    """
    record.write(_path(environment, directory), contained)
    _publish(environment, contained)


def end(environment: str, directory: Path, contained: Contained) -> None:
    """Record the release, when every restriction was removed."""
    _publish(environment, replace(contained, held=(), released=datetime.now(UTC).isoformat(timespec="seconds")))
    _path(environment, directory).unlink(missing_ok=True)


def _path(environment: str, directory: Path) -> Path:
    return directory / f".contained-{environment}"


def _variable(environment: str) -> str:
    return f"env-{environment}-contained"


def _query(ask: Callable[[], object]) -> str:
    """Prefect's answer, "" if it is down: a recovery must not wait for a dead Prefect. A busy Prefect is queried again:
    maintenance must not start because it did not answer."""
    with contextlib.suppress(httpx.HTTPError, Unreachable):
        return str(answered(ask, "the containment"))
    return ""


def _publish(environment: str, contained: Contained) -> None:
    if FlowRunContext.get():
        text = TypeAdapter(Contained).dump_json(contained).decode()
        _query(lambda: Variable.set(_variable(environment), text, overwrite=True))


def _published(environment: str) -> Contained | None:
    if FlowRunContext.get() is None:
        return None
    with contextlib.suppress(ValidationError):
        text = _query(lambda: Variable.get(_variable(environment), default=""))
        return TypeAdapter(Contained).validate_json(text) if text else None
    return None
