"""One lock per environment, for everything that changes it or takes a backup of it.

Two parts: a file lock on this host, which the kernel frees with its holder's death, and Prefect's lease, which
excludes other hosts. Without a Prefect server (a recovery may have to run then) the file lock stands alone.
A recovery outranks maintenance and ends it. Who holds the lock is kept in a Prefect Variable and beside the file.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelled, Cancelling
from prefect.variables import Variable

from runbook import lease as leases
from runbook.errors import Locked, Unreachable
from runbook.wait import until

Rank = Literal["maintenance", "recovery"]
END_SECONDS = 30.0
LAST_WORDS_SECONDS = 5.0
_NONE: Mapping[str, EnvironmentLock] = MappingProxyType({})
_held: contextvars.ContextVar[Mapping[str, EnvironmentLock]] = contextvars.ContextVar("held", default=_NONE)


@dataclass(frozen=True)
class Holder:
    """Who holds an environment, and how its death is seen."""

    runbook: str
    rank: Rank
    run_id: str
    run_name: str
    host: str
    pid: int
    pid_started: float
    since: str
    lease_id: str = ""

    def is_dead(self) -> bool:
        """True when it ran on this host and its process is gone; unknown elsewhere, so False."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            # A zombie holds nothing any more, and PID 1 of a container may never collect it.
            return abs(process.create_time() - self.pid_started) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def sentence(self, environment: str) -> Locked:
        """What the refused run says."""
        where = f"process {self.pid} on {self.host}"
        run = f"run “{self.run_name}” ({self.run_id}), {where}" if self.run_id else where
        link = (
            f" {PREFECT_UI_URL.value()}/runs/flow-run/{self.run_id}" if self.run_id and PREFECT_UI_URL.value() else ""
        )
        return Locked(
            f"{environment} is held by “{self.runbook}”, {run}, since {self.since}",
            f"wait for it to end, or cancel it{link}; a run that died frees the lock within two minutes",
        )


class EnvironmentLock:
    """The lock as its holder sees it."""

    def __init__(self, lease: leases.Lease | None) -> None:
        self._lease = lease

    def require(self) -> None:
        """Raises LockLost when it is no longer held. The file lock cannot be lost while the process lives."""
        if self._lease:
            self._lease.require()


@contextlib.contextmanager
def hold(environment: str, directory: Path, runbook: str, rank: Rank) -> Iterator[EnvironmentLock]:
    """Hold an environment; a runbook inside a runbook passes at once.

    Raises:
        Locked: another run holds it (which one, since when, what to do).
    """
    if outer := _held.get().get(environment):
        yield outer
        return
    with contextlib.ExitStack() as stack:
        me = _me(runbook, rank)
        file = stack.enter_context(_file_lock(environment, directory, me))
        lease = _lease(environment, me) if me.run_id else None
        if lease:
            stack.callback(lease.close)
            me = Holder(**{**asdict(me), "lease_id": str(lease.id)})
            _remember(environment, me)
            _write(file, me)
        lock = EnvironmentLock(lease)
        token = _held.set({**_held.get(), environment: lock})
        stack.callback(_held.reset, token)
        yield lock


def _me(runbook: str, rank: Rank) -> Holder:
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return Holder(
        runbook=runbook,
        rank=rank,
        run_id=str(run.id) if run else "",
        run_name=run.name if run else "",
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=psutil.Process().create_time(),
        since=datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


@contextlib.contextmanager
def _file_lock(environment: str, directory: Path, me: Holder) -> Iterator[IO[str]]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".lock-{environment}").open("a+", encoding="utf-8") as file:
        if not _try(file):
            holder = _read(file)
            if holder is None or not _outranks(me, holder):
                raise (
                    holder.sentence(environment)
                    if holder
                    else Locked(f"{environment} is held by a run that is just starting", "try again in a few seconds")
                )
            _end(holder, environment, file)
        _write(file, me)  # before the lease is waited for: a refused run must not read the name of the one before
        try:
            yield file
        finally:
            file.seek(0)
            file.truncate()


def _lease(environment: str, me: Holder) -> leases.Lease | None:
    run_id = UUID(me.run_id)
    if taken := leases.acquire(environment, run_id):
        return taken
    holder = _remembered(environment)
    if holder and holder.is_dead() and holder.lease_id:
        leases.release(UUID(holder.lease_id))
    elif holder and _outranks(me, holder):
        _cancel(holder, me, Cancelling)
        leases.wait_free(environment, END_SECONDS)
    if taken := leases.acquire(environment, run_id):
        return taken
    if holder:
        raise holder.sentence(environment)
    raise Locked(f"{environment} is held by another run", "look at the running flow runs and try again")


def _outranks(me: Holder, holder: Holder) -> bool:
    return me.rank == "recovery" and holder.rank == "maintenance"


def _end(holder: Holder, environment: str, file: IO[str]) -> None:
    """A recovery ends the maintenance that holds this host's lock: TERM, then KILL."""
    me = _me("", "recovery")
    # A shared directory: its process id means another process here. Our own process holds it in another thread.
    if holder.host != me.host or holder.pid == me.pid:
        raise holder.sentence(environment)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not holder.is_dead():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(holder.pid, number)
        try:
            until(lambda: _try(file), what=f"the end of “{holder.runbook}”", seconds=END_SECONDS)
        except Unreachable:
            continue
        if holder.run_id and me.run_id:
            with contextlib.suppress(Unreachable):  # its last words are “Crashed”: after them
                until(holder.is_dead, what="its end", seconds=LAST_WORDS_SECONDS)
            _cancel(holder, me, Cancelled)
        return
    raise Locked(f"“{holder.runbook}” (process {holder.pid}) could not be ended", "end it by hand, then try again")


def _cancel(holder: Holder, me: Holder, state: Callable[..., State]) -> None:
    """Cancelling: the worker on the holder's host ends it. Cancelled: it was ended here, and nobody is to read that as
    a failure of its own."""
    message = f"ended by the recovery “{me.run_name}”, which outranks maintenance"
    with get_client(sync_client=True) as client, contextlib.suppress(httpx.HTTPError, ObjectNotFound):
        client.set_flow_run_state(UUID(holder.run_id), state(message=message), force=state is Cancelled)


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> Holder | None:
    file.seek(0)
    return _parse(file.read())


def _write(file: IO[str], holder: Holder) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(asdict(holder)))
    file.flush()


def _variable(environment: str) -> str:
    return f"{leases.limit_name(environment)}-holder"


def _remember(environment: str, holder: Holder) -> None:
    Variable.set(_variable(environment), json.dumps(asdict(holder)), overwrite=True)


def _remembered(environment: str) -> Holder | None:
    return _parse(str(Variable.get(_variable(environment), default="")))


def _parse(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
