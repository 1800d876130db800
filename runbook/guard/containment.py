"""An environment that is contained: an incident is looked into, and maintenance changes nothing until it is released.

Kept in a file beside the reports, so that it holds without a Prefect server, and in a Prefect Variable for other hosts.
Backups go on (they only add), recoveries too; what would delete or change is refused, at its start and before every
irreversible act.
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
class Held:
    """One thing that was held still, and how it was before: `before` as its kind needs it ("" where nothing was)."""

    kind: str
    target: str
    before: str = ""


@dataclass(frozen=True)
class Contained:
    """Who contained an environment, why and since when (`began` is the same as seconds since 1970), what is held still,
    and when it was released ("" while not)."""

    id: str
    began: float
    by: str
    reason: str
    since: str
    host: str
    held: tuple[Held, ...] = ()
    released: str = ""

    @property
    def told(self) -> str:
        """For people."""
        return f"contained by {self.by} on {self.host} since {self.since}: {self.reason}"

    def refusal(self, environment: str) -> OpsError:
        """What maintenance says."""
        hint = "recoveries go on. When the incident is over: release-containment"
        return Locked(f"{environment} is {self.told}", f"{hint}, with confirm={environment}")


def read(environment: str, directory: Path, *, asks: bool = True) -> Contained | None:
    """The containment that is in force, by this host's file and, where this is one of its runs, by Prefect: `asks` is
    False where that is known not to answer.

    A file of one that was released on another host is removed, one that Prefect does not know (it was away) is told to
    it, and one that this host does not know is noted here.

    Raises:
        OpsError: the file cannot be read: nothing may be changed then.
    """
    here = record.read(_path(environment, directory), Contained, _HINT)
    there = _published(environment) if asks else None
    if here and there and (there.released if there.id == here.id else there.began > here.began):
        _path(environment, directory).unlink(missing_ok=True)
        here = None
    if here and there != here and asks:
        _publish(environment, here)
    if there and not here and not there.released:
        with contextlib.suppress(OpsError):  # for this host's programs that ask no Prefect: `is_here`
            record.write(_path(environment, directory), there)
    return here or (there if there and not there.released else None)


def is_here(environment: str, directory: Path) -> bool:
    """Whether this host's file says so: for programs that are no runs."""
    return _path(environment, directory).exists()


def write(environment: str, directory: Path, contained: Contained) -> None:
    """Before anything is held still: whoever is killed then can be followed by one who goes on or releases.

    Raises:
        OpsError: it cannot be written. Nothing may be changed then.
    """
    record.write(_path(environment, directory), contained)
    _publish(environment, contained)


def end(environment: str, directory: Path, contained: Contained) -> None:
    """When everything is as it was."""
    _publish(environment, replace(contained, held=(), released=datetime.now(UTC).isoformat(timespec="seconds")))
    _path(environment, directory).unlink(missing_ok=True)


def _path(environment: str, directory: Path) -> Path:
    return directory / f".contained-{environment}"


def _variable(environment: str) -> str:
    return f"env-{environment}-contained"


def _told(ask: Callable[[], object]) -> str:
    """What Prefect says; "" where it is away: a recovery must not stand still because Prefect died. One that is only
    busy is asked again: maintenance must not go on because it did not say."""

    with contextlib.suppress(httpx.HTTPError, Unreachable):
        return str(answered(ask, "the containment"))
    return ""


def _publish(environment: str, contained: Contained) -> None:
    if FlowRunContext.get():
        text = TypeAdapter(Contained).dump_json(contained).decode()
        _told(lambda: Variable.set(_variable(environment), text, overwrite=True))


def _published(environment: str) -> Contained | None:
    if FlowRunContext.get() is None:
        return None
    with contextlib.suppress(ValidationError):
        text = _told(lambda: Variable.get(_variable(environment), default=""))
        return TypeAdapter(Contained).validate_json(text) if text else None
    return None
