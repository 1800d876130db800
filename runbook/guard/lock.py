"""One lock per environment, for everything that changes it or takes a backup of it.

Two parts: a file lock on this host, which the kernel frees with its holder's death, and Prefect's lease, which
excludes other hosts. Without a Prefect server (a recovery may have to run then) the file lock stands alone.
A recovery outranks maintenance and ends it; both end a plan that holds the lock (most hold none). Who holds the lock is
kept in a Prefect Variable and beside the file.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar, get_args
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling

from runbook.errors import Locked, Unreachable
from runbook.files import durable
from runbook.guard import lease as leases
from runbook.guard.brief import asked_briefly
from runbook.guard.guards import Excluding
from runbook.guard.holder import LockHolder, Rank, lock_file, read, remember, remembered, this_run, write
from runbook.log import logger
from runbook.wait import until

END_SECONDS = 30.0
LAST_WORDS_SECONDS = 5.0
POLL_SECONDS = 5.0
T = TypeVar("T")
_NONE: Mapping[str, EnvironmentLock] = MappingProxyType({})
_held: contextvars.ContextVar[Mapping[str, EnvironmentLock]] = contextvars.ContextVar("held", default=_NONE)


class EnvironmentLock:
    """The lock as its holder sees it."""

    def __init__(
        self, lease: leases.Lease | None, exclusion: Callable[[], Excluding] | None = None, patience_seconds: float = 0
    ) -> None:
        self._lease = lease
        self._exclusion = exclusion
        self._patience_seconds = patience_seconds
        self._excluding: Excluding | None = None
        self._excluded = ""

    @property
    def keeps_out(self) -> str:
        """Whom it keeps out."""
        return "runs on all hosts" if self._lease else "runs on this host only: this one was not launched by Prefect"

    def require(self) -> None:
        """Raises LockLost when it is no longer held. The file lock cannot be lost while the process lives."""
        if self._lease:
            self._lease.require()
        if self._excluding:
            self._excluding.require()

    def exclude(self) -> str:
        """The second key: what is changed is locked itself, once, whatever environment describes it. Returns what.
        Where another run has it, it is waited for as long as the environment's lock.

        Raises:
            Locked: another run has it (which one, what to do).
            LockLost: the environment's lock was lost meanwhile.
        """
        if (make := self._exclusion) and self._excluding is None:

            def take() -> tuple[Excluding, str]:
                excluding = make()  # anew each time: while it is waited for, servers may change
                return excluding, excluding.take()

            self._excluding, self._excluded = _patiently(take, self._patience_seconds, self.require)
        return self._excluded

    def close(self) -> None:
        """Free what `exclude` locked."""
        if self._excluding:
            self._excluding.close()

    @property
    def is_silent(self) -> bool:
        """Whether Prefect does not answer now."""
        return self._lease is not None and self._lease.is_silent

    @property
    def silence(self) -> str:
        """For how long Prefect did not confirm it, and how long this run waited for that; "" where it always did."""
        return self._lease.silence if self._lease else ""


@contextlib.contextmanager
def hold(
    environment: str,
    directory: Path,
    runbook: str,
    rank: Rank,
    patience_seconds: float = 0.0,
    *,
    excluding: Callable[[str], Excluding] | None = None,
) -> Iterator[EnvironmentLock]:
    """Hold an environment; a runbook inside a runbook passes at once. Held, it is waited for `patience_seconds`.

    Raises:
        Locked: another run holds it (which one, since when, what to do).
    """
    if outer := _held.get().get(environment):
        yield outer
        return
    with contextlib.ExitStack() as stack:
        lease = _patiently(lambda: _acquired(stack, environment, directory, this_run(runbook, rank)), patience_seconds)
        lock = EnvironmentLock(lease, partial(excluding, runbook) if excluding else None, patience_seconds)
        stack.callback(lock.close)
        token = _held.set({**_held.get(), environment: lock})
        stack.callback(_held.reset, token)
        yield lock


def _patiently(attempt: Callable[[], T], seconds: float, between: Callable[[], None] = lambda: None) -> T:
    refused: Locked | Unreachable | None = None

    def once() -> tuple[T] | None:
        nonlocal refused
        between()
        try:
            return (attempt(),)
        except (Locked, Unreachable) as error:
            if seconds and refused is None:
                logger().info("waiting for at most %.0f s: %s", seconds, error.message)
            refused = error
            return None

    try:
        found = until(once, what="the lock", seconds=seconds, every_seconds=POLL_SECONDS if seconds else 0)
    except Unreachable:
        assert refused
        raise refused from None
    assert found
    return found[0]


def _acquired(stack: contextlib.ExitStack, environment: str, directory: Path, me: LockHolder) -> leases.Lease | None:
    """Both parts of it; `stack` gives them back."""
    with contextlib.ExitStack() as own:
        file = own.enter_context(_file_lock(environment, directory, me))
        # Without its address Prefect starts a temporary server: a lease there would keep out nobody.
        lease = _lease(environment, me) if me.run_id and PREFECT_API_URL.value() else None
        if lease:
            own.callback(lease.close)
            me = replace(me, lease_id=str(lease.id))
            remember(environment, me)
            write(file, me)
            lease.retake = partial(_retake, environment, me)
        stack.push(own.pop_all())
    return lease


@contextlib.contextmanager
def _file_lock(environment: str, directory: Path, me: LockHolder) -> Iterator[IO[str]]:
    directory.mkdir(parents=True, exist_ok=True)
    path = lock_file(environment, directory)
    with _opened(path) as file:
        while not taken(file):
            holder = read(file)
            if holder is None or not _outranks(me, holder):
                raise (
                    holder.sentence(environment)
                    if holder
                    else Locked(f"{environment} is held by a run that is just starting", "try again in a few seconds")
                )
            if _end(holder, environment, file, me):
                break
        if not _is_at(path, file):
            raise Locked(f"{path} was deleted or replaced by something else than a run", "try again; leave that file")
        write(file, me)  # before the lease is waited for: a refused run must not read the name of the one before
        try:
            yield file
        finally:
            file.seek(0)
            file.truncate()


def _opened(path: Path) -> IO[str]:
    """Never by a link: it could lead to a file that is not ours, which the name of the holder would replace."""
    try:
        return durable.open_lock(path)
    except PermissionError:
        owner = path.lstat().st_uid
        raise Locked(f"{path} belongs to the account with ID {owner}", "run this as that account") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise Locked(f"{path} is a symbolic link", "find out who made it, then delete the link") from None


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the locked file has its name still: a deleted one excludes nobody who comes later."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _lease(environment: str, me: LockHolder) -> leases.Lease | None:
    run_id = UUID(me.run_id)
    if taken := leases.acquire(environment, run_id):
        return taken
    holder = remembered(environment)
    if holder and holder.is_dead() and holder.lease_id:
        leases.release(UUID(holder.lease_id))
    elif holder and _outranks(me, holder):
        _cancel(holder, me, Cancelling)
        leases.wait_free(environment, END_SECONDS)
    if taken := leases.acquire(environment, run_id):
        return taken
    if holder:
        raise holder.sentence(environment)
    raise Locked(f"{environment} is held by another run", "check the running flow runs and try again")


def _retake(environment: str, me: LockHolder) -> UUID | None:
    """The slot again, after Prefect was away for longer than the lease; None where another run held it since."""

    def nobody_since() -> bool:
        holder = remembered(environment)
        return holder is not None and (holder.run_id, holder.process) == (me.run_id, me.process)

    if not nobody_since() or not (taken := leases.take(environment, UUID(me.run_id))):
        return None
    if not nobody_since():  # somebody took it and gave it back between the two
        leases.release(taken)
        return None
    remember(environment, replace(me, lease_id=str(taken)))
    return taken


def _outranks(me: LockHolder, holder: LockHolder) -> bool:
    ranks = get_args(Rank)
    return ranks.index(me.rank) > ranks.index(holder.rank)


def _end(holder: LockHolder, environment: str, file: IO[str], me: LockHolder) -> bool:
    """End the run of a lower rank that holds this host's lock: TERM, then KILL. False where another run has it by then:
    that one is judged anew."""
    process = holder.identity
    # Another host or container that shares the directory: its process id means another process here. Or our own
    # process holds it in another thread.
    if process is None or process.is_this_process:
        raise holder.sentence(environment)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not holder.is_dead():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                process.send(number)
        try:
            until(
                lambda: taken(file) or _has_changed(holder, file),
                what=f"the end of “{holder.runbook}”",
                seconds=END_SECONDS,
            )
        except Unreachable:
            continue
        if not taken(file):
            return False
        if holder.run_id and me.run_id:
            with contextlib.suppress(Unreachable):  # its last words are “Crashed”: after them
                until(holder.is_dead, what="its end", seconds=LAST_WORDS_SECONDS)
            _cancel(holder, me, Cancelled)
        return True
    raise Locked(f"“{holder.runbook}” (process {holder.pid}) could not be ended", "end it by hand, then try again")


def _has_changed(holder: LockHolder, file: IO[str]) -> bool:
    now = read(file)
    return now is not None and now.process != holder.process


def _cancel(holder: LockHolder, me: LockHolder, state: Callable[..., State]) -> None:
    """Cancelling: the worker on the holder's host ends it. Cancelled: it was ended here, and nobody is to read that as
    a failure of its own."""
    by = me.run_name or me.runbook
    message = (
        f"ended by “{by}”: a plan makes way for every run that changes something. Nothing has changed; plan again"
        if holder.rank == "plan"
        else f"ended by the recovery “{by}”, which outranks maintenance"
    )
    with (
        asked_briefly(retries=2),
        get_client(sync_client=True) as client,
        contextlib.suppress(httpx.HTTPError, ObjectNotFound),
    ):
        client.set_flow_run_state(UUID(holder.run_id), state(message=message), force=state is Cancelled)


def taken(file: IO[str]) -> bool:
    """Whether the file's lock is this process's now; not waited for."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
