"""Health and smoke checks against a small real HTTP server that breaks in every way in which the application may."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.places import Application
from runbook.errors import OpsError
from tasks.application import smoke_check, wait_healthy
from tests.servers import free_port

PASSWORD = "smoke-pass-4714"


class Backend:
    """The interview API, as far as the checks use it; `fault` says what is broken."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.health: list[tuple[int, dict[str, str]]] = []
        self.asked = 0
        self.messages: list[dict[str, Any]] = []
        self.position = ""

    def answer(self, method: str, path: str, body: dict[str, Any], token: str) -> tuple[int, Any]:
        if path == "/health":
            self.asked += 1
            status, found = self.health.pop(0) if self.health else (200, {"status": "healthy"})
            return status, found
        if path == "/api/auth/login":
            good = body == {"username": "monitor", "password": PASSWORD}
            return (
                (200, {"token": "t0ken", "user_id": "1"}) if good else (401, {"detail": "invalid username or password"})
            )
        if token != "Bearer t0ken":
            return 401, {"detail": "not logged in"}
        if method == "POST" and path == "/api/interview/sessions":
            self.position = body["position"]
            return (500, {"detail": "boom"}) if self.fault == "sessions" else (201, {"session_id": "5e55"})
        if method == "POST":
            return self._message(body["content"])
        found = self.messages[:1] if self.fault == "lost" else self.messages
        return 200, {"session_id": "5e55", "position": self.position, "messages": found}

    def _message(self, content: str) -> tuple[int, Any]:
        if self.fault == "ai":
            return 503, {"detail": "AI providers unavailable"}
        reply = "" if self.fault == "empty" else "それでは始めましょう。"
        stored = content.replace("で", "て") if self.fault == "altered" else content
        self.messages = [
            {"message_id": 1, "role": "user", "content": stored},
            {"message_id": 2, "role": "assistant", "content": reply},
        ]
        answer = {"message_id": 1, "reply": {"message_id": 2, "content": reply, "provider": "azure", "model": "gpt-4o"}}
        return 201, {"message_id": 1} if self.fault == "shape" else answer


@contextmanager
def serving(backend: Backend) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length) or "{}")
            status, found = backend.answer(method, self.path, body, self.headers.get("authorization", ""))
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of these tests are threads beside them: where one stands still, so does the other."""
    monkeypatch.setattr("tasks.application.HEALTH_TIMEOUT_SECONDS", 120.0)


def application(url: str, password: str = PASSWORD, frontend_url: str = "") -> Application:
    return Application(url=url, frontend_url=frontend_url, user="monitor", password=SecretStr(password))


def test_health_needs_several_good_answers_in_a_row() -> None:
    backend = Backend()
    bad = (503, {"status": "unhealthy", "database": "unreachable", "redis": "ok"})
    backend.health = [bad, (200, {}), (200, {}), bad, (200, {}), (200, {}), (200, {})]
    with serving(backend) as url:
        health = wait_healthy(application(url + "/"), seconds=120, in_a_row=3)
    assert backend.asked == 7
    assert health.in_a_row == 3
    assert url in health.answer


def test_an_unhealthy_backend_is_told_with_its_last_answer_within_the_deadline() -> None:
    backend = Backend()
    backend.health = [(503, {"status": "unhealthy", "database": "unreachable", "redis": "ok"})] * 1000
    started = time.monotonic()
    with (
        serving(backend) as url,
        pytest.raises(OpsError, match="backend answers 503: database unreachable$|—") as raised,
    ):
        wait_healthy(application(url), seconds=1)
    assert time.monotonic() - started < 100, "not retried: the deadline is the operator's"
    assert raised.value.message.endswith("backend answers 503: database unreachable")
    assert "logs" in raised.value.hint


def test_a_frontend_that_nobody_serves_is_named() -> None:
    with serving(Backend()) as url:
        nowhere = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(OpsError, match="frontend at .* does not answer"):
            wait_healthy(application(url, frontend_url=nowhere), seconds=1)


def test_the_smoke_checks_go_the_whole_way() -> None:
    backend = Backend()
    with serving(backend) as url:
        result = smoke_check(application(url))
    assert result.ok, result.detail
    assert [row.check for row in result.rows] == ["ログイン", "面接セッション作成", "AI応答", "データ読み書き"]
    assert "azure" in result.rows[2].detail
    assert result.detail == "4 checks passed"


@pytest.mark.parametrize(
    ("fault", "failed", "detail"),
    [
        ("sessions", "面接セッション作成", "answers 500 instead of 201: boom"),
        ("ai", "AI応答", "503 instead of 201: AI providers unavailable"),
        ("empty", "AI応答", "answer is empty"),
        ("shape", "AI応答", "no reply"),
        ("lost", "データ読み書き", "1 messages of 2"),
        ("altered", "データ読み書き", "differs from what was written"),
    ],
)
def test_what_is_broken_is_the_row_that_fails(fault: str, failed: str, detail: str) -> None:
    with serving(Backend(fault)) as url:
        result = smoke_check(application(url))
    assert not result.ok
    first = next(row for row in result.rows if not row.ok)
    assert first.check == failed
    assert detail in first.detail
    assert len(result.rows) == 4
    assert all("not run" in row.detail for row in result.rows[result.rows.index(first) + 1 :])


def test_wrong_credentials_and_a_dead_backend_show_no_password() -> None:
    with serving(Backend()) as url:
        refused = smoke_check(application(url, password="wr0ng-4715"))
    dead = smoke_check(application(f"http://127.0.0.1:{free_port()}"))
    assert "answers 401 instead of 200: invalid username or password" in refused.detail
    assert "no answer (ConnectError)" in dead.detail
    for text in (str(refused), str(dead)):
        assert "4715" not in text
        assert PASSWORD not in text
