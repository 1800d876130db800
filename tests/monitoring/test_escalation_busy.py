"""Escalation while Prefect answers nobody: whoever is on call does not wait for it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from flows.monitoring import wording
from flows.monitoring.escalation import escalate
from tasks.alerts.cause import read_cause
from tests.monitoring.duty import NAME, Duty


class Busy(ThreadingHTTPServer):
    """A Prefect server that has no time; `asked` is what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusing)
        self.asked: list[str] = []


class _Refusing(BaseHTTPRequestHandler):
    server: Busy

    def log_message(self, format: str, *args: object) -> None:
        """No noise."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET


@pytest.fixture
def busy() -> Iterator[Busy]:
    server = Busy()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    with temporary_settings({PREFECT_API_URL: f"{address}/api", PREFECT_UI_URL: address}):
        yield server
    server.shutdown()
    server.server_close()


def test_what_an_alert_would_like_to_know_is_asked_once(duty: Duty, busy: Busy) -> None:
    escalate.fn(NAME, what="x")
    (incident,) = duty.incidents()
    run = str(uuid.uuid4())
    env = duty.env
    with FlowRunContext.model_construct():
        cause = read_cause.work(run)
        told = wording.how_to_acknowledge(env, incident)
    assert cause.address.endswith(run)
    assert told.startswith("python -m flows.monitoring.acknowledgement")
    assert len(busy.asked) >= 2
    assert len(set(busy.asked)) == len(busy.asked), "it is not waited for"
