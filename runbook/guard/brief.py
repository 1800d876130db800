"""Questions to Prefect that something urgent would wait for: Prefect may be what is down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SettingsContext, SyncClientContext, get_settings_context

from runbook.errors import Unreachable
from runbook.wait import until

T = TypeVar("T")
SECONDS, BUSY_SECONDS = 10.0, 30.0
PAUSE_SECONDS = "0.1"


@contextlib.contextmanager
def asked_briefly(seconds: float = SECONDS, *, retries: int = 0) -> Iterator[None]:
    """Each is asked once (and `retries` times more), for so long at most: Prefect's own patience with a busy server is
    minutes.

    Inside a flow run `get_client` hands out the run's own client, whose timeout is fixed at 60 s: it is set aside.
    """
    own = cast(Any, SyncClientContext.__var__)
    with patience(retries, seconds):
        token = own.set(None)
        try:
            yield
        finally:
            own.reset(token)


def impatient_client(timeout_seconds: float | None = None) -> SyncPrefectClient:
    """A client that asks a busy Prefect again after a tenth of a second, as often as `patience` says.

    One with SQLite answers 503 to a busy moment, with 2 s as Retry-After. Prefect's client (3.9.1) sleeps so long also
    where it does not ask again.
    """
    timeout = {} if timeout_seconds is None else {"timeout": timeout_seconds}
    return get_client(sync_client=True, httpx_settings={"event_hooks": {"response": [_soon]}, **timeout})


def _soon(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = PAUSE_SECONDS


@contextlib.contextmanager
def patience(retries: int, seconds: float | None = None) -> Iterator[None]:
    """How often Prefect's clients that are opened in the block try again, and how long they wait (None: as set).

    `temporary_settings` would validate each of Prefect's settings again: 45 ms of processor time, several times a run.
    """
    context = get_settings_context()
    settings = context.settings
    api = settings.api if seconds is None else settings.api.model_copy(update={"request_timeout": seconds})
    client = settings.client.model_copy(update={"max_retries": retries})
    changed = settings.model_copy(update={"api": api, "client": client})
    with SettingsContext(profile=context.profile, settings=changed):
        yield


def answered(ask: Callable[[], T], what: str) -> T:
    """What `ask` returns of Prefect: one that is busy is asked again for `BUSY_SECONDS`. Without this bound Prefect's
    client tries for ten minutes (60 s, up to nine times) where a server takes connections and does not answer.

    Raises:
        Unreachable: there was no answer.
    """

    def once() -> tuple[T]:
        try:
            return (ask(),)
        except httpx.HTTPStatusError as error:
            raise busy(error) from None
        except httpx.TransportError as error:
            raise Unreachable(f"Prefect does not answer ({type(error).__name__})") from None

    with asked_briefly(min(SECONDS, BUSY_SECONDS)):
        return until(once, what=f"an answer of Prefect about {what}", seconds=BUSY_SECONDS)[0]


def busy(error: httpx.HTTPStatusError) -> Exception:
    """What to raise of an answer: `Unreachable`, worth another try, where Prefect (its SQLite) is only busy, or its
    database is away for a moment (500)."""
    code = error.response.status_code
    return Unreachable(f"Prefect answers {code}: it is busy, or its database is away") if code >= 500 else error
