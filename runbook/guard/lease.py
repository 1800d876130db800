"""The environment's lease in Prefect: a global concurrency limit `env-<name>` of one slot, taken and renewed over REST.

The REST API is used instead of Prefect's `concurrency(...)` so that the lease's id can be kept beside who holds it, and
so that a lost lease is noticed where it matters (before an irreversible act) instead of cancelling the flow anywhere.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from runbook.errors import LockLost, Unreachable
from runbook.guard.brief import BUSY_SECONDS, answered, asked_briefly, busy, impatient_client, patience
from runbook.wait import until

LEASE_SECONDS = 90.0
RENEW_EVERY_SECONDS = 20.0
ANSWER_SECONDS = 3.0


def limit_name(environment: str) -> str:
    """The global concurrency limit of an environment."""
    return f"env-{environment}"


def ensure_limit(environment: str) -> None:
    """Create the environment's limit of one slot where it is not there yet.

    Raises:
        Unreachable: Prefect does not answer.
    """
    new = GlobalConcurrencyLimitCreate(name=limit_name(environment), limit=1)

    def ensured() -> None:
        with impatient_client() as client:
            try:
                client.read_global_concurrency_limit_by_name(new.name)
            except ObjectNotFound:
                with contextlib.suppress(ObjectAlreadyExists):
                    client.create_global_concurrency_limit(new)

    answered(ensured, "the lock's limit")


def acquire(environment: str, flow_run_id: UUID) -> Lease | None:
    """Take the slot and keep it, or None when it is taken."""
    asked = boot_seconds()
    taken = take(environment, flow_run_id)
    return Lease(taken, asked) if taken else None


def take(environment: str, flow_run_id: UUID) -> UUID | None:
    """Take the slot for `LEASE_SECONDS`; returns the lease's id, or None when it is taken."""
    ensure_limit(environment)
    holder = ConcurrencyLeaseHolder(type="flow_run", id=flow_run_id)
    return until(
        lambda: _attempt(environment, holder), what="an answer of Prefect about the lock", seconds=BUSY_SECONDS
    )[0]


def _attempt(environment: str, holder: ConcurrencyLeaseHolder) -> tuple[UUID | None]:
    """A server on SQLite that is busy answers 503 and has taken nothing.

    Its answer is waited for: it may take the slot after nobody listens any more, and that would be nobody's then.
    """
    with _client(BUSY_SECONDS) as client:
        try:
            response = client.increment_concurrency_slots_with_lease(
                names=[limit_name(environment)],
                slots=1,
                mode="concurrency",
                lease_duration=LEASE_SECONDS,
                holder=holder,
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return (None,)
            raise busy(error) from None
        except httpx.TransportError as error:
            raise Unreachable(f"Prefect does not answer ({type(error).__name__})") from None
    return (UUID(response.json()["lease_id"]),)


def release(lease_id: UUID) -> None:
    """Give a slot back by its lease: also a dead holder's. Nothing happens when the lease is already gone.

    Raises:
        Unreachable: Prefect does not answer.
    """

    def released() -> None:
        with impatient_client() as client:
            client.release_concurrency_slots_with_lease(lease_id)

    answered(released, "the end of a lease")


def boot_seconds() -> float:
    """A clock that nobody can set, and that goes on while the machine sleeps, as the lease does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A slot that is held and renewed by a thread. `asked` is when it was asked for, by `boot_seconds`. `retake` is
    asked for another lease's id when this one is gone."""

    def __init__(self, lease_id: UUID, asked: float, retake: Callable[[], UUID | None] = lambda: None) -> None:
        self.id = lease_id
        self.retake = retake
        self._confirmed = asked
        self._silent_since = math.nan
        self._silent_seconds = 0.0
        self._waited_seconds = 0.0
        self._renewing = threading.Lock()
        self._gone = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raises LockLost when Prefect reports that the lease is gone, and when it has not confirmed the lease for as
        long as it lasts: another run may hold the environment then. A Prefect that does not answer is waited for once;
        until it answers again only the thread asks."""
        if not self.is_silent or self._has_expired:
            began = time.monotonic()
            self._renew()
            if self.is_silent:
                self._waited_seconds += time.monotonic() - began
        if self._gone.is_set():
            raise LockLost(
                "this run's lock on the environment expired and may be another run's now",
                "nothing irreversible was done after that; look for the other run, then launch this one again",
            )
        if self._has_expired:
            raise LockLost(
                f"Prefect has not confirmed this run's lock for {boot_seconds() - self._confirmed:.0f} s (limit "
                f"{LEASE_SECONDS:.0f} s): another run may hold the environment now",
                "nothing irreversible was done after that; make sure that no other run changes this environment, then "
                "run it again (a recovery: with python -m flows.launch, which needs no Prefect)",
            )

    @property
    def silence(self) -> str:
        """For people: for how long Prefect did not confirm the lease, and how long this run waited for it; "" where it
        always did."""
        seconds = self._silent_seconds + (boot_seconds() - self._silent_since if self.is_silent else 0.0)
        return f"no answer for {seconds:.0f} s; this run waited {self._waited_seconds:.1f} s for it" if seconds else ""

    @property
    def is_silent(self) -> bool:
        """Whether Prefect did not answer the last question."""
        return not math.isnan(self._silent_since)

    @property
    def _has_expired(self) -> bool:
        return boot_seconds() - self._confirmed >= LEASE_SECONDS

    def close(self) -> None:
        """Stop renewing and give the slot back."""
        self._stop.set()
        self._thread.join()
        # Where Prefect is down the lease ends by itself. Where it is busy, the next run would find the slot taken.
        seconds = ANSWER_SECONDS if self.is_silent else BUSY_SECONDS
        with contextlib.suppress(httpx.HTTPError, Unreachable):
            until(lambda: self._given_back(seconds), what="the end of the lease", seconds=seconds)

    def _given_back(self, seconds: float) -> bool:
        with _client(seconds) as client:
            try:
                client.release_concurrency_slots_with_lease(self.id)
            except httpx.HTTPStatusError as error:
                raise busy(error) from None
        return True

    def _keep(self) -> None:
        while not self._stop.wait(ANSWER_SECONDS if self.is_silent else RENEW_EVERY_SECONDS):
            self._renew()

    def _renew(self) -> None:
        """Only an answer confirms the lease; 401, 403 and 500 are none."""
        asked = boot_seconds()
        if not self._renewing.acquire(timeout=ANSWER_SECONDS):  # the thread waits for an answer
            return
        try:
            answered = _renewed(self.id)
            if not answered:
                self._gone.set()
                asked = boot_seconds()
                if not (taken := self.retake()):
                    return
                self.id = taken
                self._gone.clear()
            self._confirmed = asked
            if self.is_silent:
                self._silent_seconds += boot_seconds() - self._silent_since
                self._silent_since = math.nan
        except (httpx.HTTPError, Unreachable):
            if not self.is_silent:
                self._silent_since = asked
        finally:
            self._renewing.release()


def _renewed(lease_id: UUID) -> bool:
    """False when Prefect says that the lease is gone.

    Raises:
        httpx.HTTPError: it does not answer, or does not say.
    """
    try:
        with _client() as client:
            client.renew_concurrency_lease(lease_id, lease_duration=LEASE_SECONDS)
    except ObjectNotFound:
        return False
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (httpx.codes.GONE, httpx.codes.NOT_FOUND):
            return False
        raise
    return True


@contextlib.contextmanager
def _client(seconds: float = 0) -> Iterator[SyncPrefectClient]:
    """A flow run's own client tries for minutes: with Prefect dead, a recovery would stand still before every act.

    It waits `seconds` for an answer (0: `ANSWER_SECONDS`).
    """
    with (
        patience(retries=0),
        impatient_client(seconds or ANSWER_SECONDS) as client,
    ):
        yield client


def wait_free(environment: str, seconds: float) -> bool:
    """Wait until the slot of an environment may be free, at most `seconds`; returns whether it is."""

    def has_room() -> bool:
        try:
            with asked_briefly(), get_client(sync_client=True) as client:
                limit: Any = client.read_global_concurrency_limit_by_name(limit_name(environment))
        except httpx.TransportError as error:
            raise Unreachable(f"Prefect does not answer ({type(error).__name__})") from None
        return bool(limit.active_slots < limit.limit)

    try:
        return until(has_room, what=f"a free lock on {environment}", seconds=seconds, every_seconds=0.5)
    except Unreachable:
        return False
