"""Prefect's client for probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError

from runbook.errors import Unreachable


@contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """A client of the Prefect API.

    Raises:
        Unreachable: Prefect does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            yield client
    except (httpx.HTTPError, PrefectHTTPStatusError, RuntimeError) as error:
        what = f"the Prefect API does not answer as it should ({type(error).__name__})"
        raise Unreachable(what, "check the server and PREFECT_API_URL") from None
