"""Questions to Prefect that something urgent would wait for: Prefect may be what is down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

SECONDS = 10.0


@contextlib.contextmanager
def asked_briefly() -> Iterator[None]:
    """Each is asked once, for so long at most: Prefect's own patience with a busy server is minutes."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: SECONDS}):
        yield
