"""Records of what was carried out: beside the reports on this host, and in Prefect for workers of other hosts.

A plan's record and a runbook's latest one are Prefect Variables; a flow run's record is in the labels of that run, so
that both are deleted together. The files alone count where Prefect does not answer, and the report says so.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from runbook import clock
from runbook.errors import NotConfirmed
from runbook.files import durable
from runbook.guard.brief import asked_briefly, busy, impatient_client
from runbook.log import logger
from runbook.wait import until

DIRECTORY = "carried-out"
KEPT_SECONDS = 400 * 86400.0
KEPT_IN_PREFECT = timedelta(days=8)
"""Longer than a plan can be confirmed (`pins.VALID`)."""
ANSWER_SECONDS = 3.0
MOST_CHARACTERS = 4000
"""Of a record in Prefect, whose Variables have 5,000 characters at most: a longer one goes there without its lists."""
MOST_DELETED = 50
PLAN, RUN, LAST = "plan-", "run-", "last-"
T = TypeVar("T")


class CarriedOut(NotConfirmed):
    """The plan, or this very flow run, was carried out before."""


@dataclass(frozen=True)
class CarriedOutPlan:
    """A run that was permitted to carry out a plan; `ended` where it did. `items`: digests of the lists that it was
    permitted to delete, by pin."""

    runbook: str
    at: str
    plan: str = ""
    ended: bool = True
    attempt: str = ""
    link: str = ""
    items: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """When, and where to read about it."""
        return f"at {clock.text(datetime.fromisoformat(self.at))}" + (f" ({self.link})" if self.link else "")

    @property
    def text(self) -> str:
        """JSON; `parse` reads it."""
        return json.dumps(asdict(self))


def parse(text: object) -> CarriedOutPlan:
    """Raises ValueError or TypeError where it is no record."""
    return CarriedOutPlan(**json.loads(str(text)))


@dataclass
class Records:
    """Of one environment. `is_local`: Prefect did not answer, or refused, when it was last queried."""

    reports: Path
    environment: str
    is_local: bool = False

    def find(self, name: str) -> CarriedOutPlan | None:
        """The record of that name, by this host's file or by Prefect: the one that ended, then the newest.

        Raises:
            CarriedOut: a plan's file cannot be read.
        """
        found = [one for one in (self._in_file(name), self._in_prefect(name)) if one]
        return max(found, key=lambda one: (one.ended, datetime.fromisoformat(one.at)), default=None)

    def write(self, names: Sequence[str], done: CarriedOutPlan) -> None:
        """Into Prefect, where it answers; then into files.

        Raises:
            OSError: the files cannot be written.
        """
        # Prefect is waited for once, and once more when a flow run's work is done: it may be there again.
        asks = current_run() or any(name.startswith(PLAN) for name in names)
        if asks and not (self.is_local and not (done.ended and current_run())):
            self._query(lambda client: self._write_to_prefect(client, names, done), None)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._prune_files()
        for name in names:
            durable.write(self.directory / name, done.text + "\n")

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.reports / DIRECTORY

    def _in_file(self, name: str) -> CarriedOutPlan | None:
        try:
            return parse((self.directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            if not name.startswith(PLAN):  # a disk that fails must not refuse a recovery
                return None
            what = f"{self.directory / name} cannot be read: this plan may have been carried out ({error})"
            raise CarriedOut(what, "check what was done, then run it with an empty plan") from None

    def _prune_files(self) -> None:
        for old in self.directory.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                    old.unlink()

    def _in_prefect(self, name: str) -> CarriedOutPlan | None:
        run = current_run()
        if name.startswith(RUN):
            text: object = run.labels.get(DIRECTORY) if run and name == f"{RUN}{run.id}" else None
        elif self.is_local:  # it is waited for once
            return None
        else:
            found = self._query(lambda client: client.read_variable_by_name(self._variable(name)), None)
            text = found.value if found else None
        try:
            return parse(text) if text else None
        except (ValueError, TypeError):
            return None

    def _variable(self, name: str) -> str:
        return f"{DIRECTORY}-{self.environment}-{name}"

    def _write_to_prefect(self, client: SyncPrefectClient, names: Sequence[str], done: CarriedOutPlan) -> None:
        short = done if len(done.text) <= MOST_CHARACTERS else CarriedOutPlan(**{**asdict(done), "items": {}})
        run = current_run()
        for name in names:
            if run and name == f"{RUN}{run.id}":
                client.update_flow_run_labels(run.id, {DIRECTORY: short.text})
            elif not name.startswith(RUN):
                bare = CarriedOutPlan(**{**asdict(short), "plan": ""})  # its name has the plan's digest
                _put(client, self._variable(name), bare.text, [DIRECTORY, self.environment])
        if done.ended and any(name.startswith(PLAN) for name in names):
            # A busy Prefect answers 500 where its database is locked. The next run deletes what is left.
            with contextlib.suppress(PrefectHTTPStatusError):
                self._prune_variables(client)

    def _prune_variables(self, client: SyncPrefectClient) -> None:
        """Plans that nobody can confirm any more."""
        mine = {"name": {"like_": self._variable(PLAN)}, "tags": {"all_": [DIRECTORY, self.environment]}}
        answer = client.request("POST", "/variables/filter", json={"variables": mine, "limit": 200})
        oldest = datetime.now(UTC) - KEPT_IN_PREFECT
        old = [one["name"] for one in answer.json() if datetime.fromisoformat(one["updated"]) < oldest]
        for name in old[:MOST_DELETED]:
            with contextlib.suppress(ObjectNotFound):
                client.delete_variable_by_name(name)

    def _query(self, ask: Callable[[SyncPrefectClient], T], otherwise: T) -> T:
        """A Prefect that does not answer, or refuses, must not stop a recovery."""
        address = PREFECT_API_URL.value()
        if not address:
            self.is_local = True
            return otherwise
        try:
            url = httpx.URL(address)  # Prefect's client tries a refused connection four times
            socket.create_connection(
                (url.host, url.port or (443 if url.scheme == "https" else 80)), ANSWER_SECONDS
            ).close()
            with asked_briefly(ANSWER_SECONDS), impatient_client() as client:
                (answer,) = until(lambda: _once(ask, client), what="an answer of Prefect", seconds=ANSWER_SECONDS)
        except Exception as error:
            logger().warning("records of carried-out plans: Prefect did not answer (%s)", type(error).__name__)
            self.is_local = True
            return otherwise
        self.is_local = False
        return answer


def current_run() -> FlowRun | None:
    """The flow run that this code works for."""
    context = FlowRunContext.get()
    return context.flow_run if context else None


def _once(ask: Callable[[SyncPrefectClient], T], client: SyncPrefectClient) -> tuple[T]:
    """Raises Unreachable, worth another try, where Prefect's database is locked for a moment."""
    try:
        return (ask(client),)
    except httpx.HTTPStatusError as error:
        raise busy(error) from None


def _put(client: SyncPrefectClient, name: str, value: Any, tags: list[str]) -> None:
    try:
        client.create_variable(VariableCreate(name=name, value=value, tags=tags))
    except ObjectAlreadyExists:
        client.update_variable(VariableUpdate(name=name, value=value, tags=tags))
