"""Questions to Prefect that something urgent would wait for: Prefect may be what is down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from prefect.context import SyncClientContext
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

SECONDS = 10.0


@contextlib.contextmanager
def asked_briefly(seconds: float = SECONDS, *, retries: int = 0) -> Iterator[None]:
    """Each is asked once (and `retries` times more), for so long at most: Prefect's own patience with a busy server is
    minutes.

    Inside a flow run `get_client` hands out the run's own client, whose timeout is fixed at 60 s: it is set aside.
    """
    own = cast(Any, SyncClientContext.__var__)
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries, PREFECT_API_REQUEST_TIMEOUT: seconds}):
        token = own.set(None)
        try:
            yield
        finally:
            own.reset(token)
