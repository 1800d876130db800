"""Prefect's client for probes, and the judgement whether Prefect serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from runbook.errors import OpsError, Unreachable
from runbook.guard.brief import asked_briefly, impatient_client


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


def serves(seconds: float) -> bool:
    """Return True if Prefect answers a query of its database within `seconds`, by the client that a flow run uses.

    `/health` and `/admin/version` need no database: a Prefect that lost its own answers them, and can run nothing.

    Raises:
        OpsError: it refuses this process's log-in.
    """
    if not PREFECT_API_URL.value():
        return False
    try:
        with asked_briefly(seconds), impatient_client() as client:
            client.request("POST", "/flows/count", json={})
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise OpsError("Prefect refuses the log-in of this shell", "set PREFECT_API_AUTH_STRING") from None
        return False
    except (httpx.HTTPError, RuntimeError, ValueError):  # ValueError: an answer that is not Prefect's
        return False
    return True
