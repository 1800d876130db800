"""Prefect's clients that are opened in a block try less, and nothing else of Prefect's settings changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)
from prefect.settings.legacy import Settings

from runbook.guard.brief import asked_briefly, impatient_client, patience

CHANGED = {"PREFECT_API_REQUEST_TIMEOUT", "PREFECT_CLIENT_MAX_RETRIES"}


def told(settings: Settings) -> dict[str, str]:
    return {name: value for name, value in settings.to_environment_variables().items() if name not in CHANGED}


def test_a_client_waits_and_tries_as_often_as_the_block_says() -> None:
    before = get_current_settings()
    with asked_briefly(3, retries=1):
        inside = get_current_settings()
        assert (inside.api.request_timeout, inside.client.max_retries) == (3, 1)
        with get_client(sync_client=True) as client:
            assert client._client.timeout.read == 3
        with patience(retries=0):  # the time stays
            assert get_current_settings().api.request_timeout == 3
            assert get_current_settings().client.max_retries == 0
        assert get_current_settings() is inside
    assert get_current_settings() is before


def test_every_other_setting_is_as_prefect_s_own_way_leaves_it() -> None:
    with temporary_settings({PREFECT_API_REQUEST_TIMEOUT: 3.0, PREFECT_CLIENT_MAX_RETRIES: 1}):
        theirs = get_current_settings()
    with asked_briefly(3, retries=1):
        ours = get_current_settings()
    assert told(ours) == told(theirs)
    assert ours.to_environment_variables(exclude_unset=True).keys() >= CHANGED, "a process that is started gets them"


class Busy(BaseHTTPRequestHandler):
    """As Prefect's server answers while its SQLite is locked."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(503)
        self.send_header("Retry-After", "2")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing in the test's output."""


@pytest.fixture
def busy() -> Iterator[type[Busy]]:
    Busy.asked = 0
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            yield Busy
        server.shutdown()


@pytest.mark.parametrize("retries", [0, 3])
def test_a_busy_prefect_is_not_waited_for_as_long_as_it_asks(busy: type[Busy], retries: int) -> None:
    """With the header as it is each attempt would take 2 s, the last one too."""
    began = time.monotonic()
    with (
        patience(retries),
        impatient_client() as client,
        pytest.raises(httpx.HTTPStatusError, match="503"),
    ):
        client.read_variable_by_name("any")
    assert busy.asked == 1 + retries
    assert time.monotonic() - began < 2
