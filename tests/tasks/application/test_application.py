"""Health and smoke checks against a small real HTTP server that breaks in every way in which the application may."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from prefect.types import SecretDict
from pydantic import SecretStr

from blocks.config import toml
from blocks.http_step import HttpStep
from blocks.places import Application
from runbook.errors import OpsError
from tasks.application.health import read_problems, smoke_check, wait_healthy
from tests.fixtures.servers import free_port

PASSWORD = "smoke-pass-4714"
TOKEN = "t0ken-4716-" + "x" * 60  # longer than what a report shows of a value
# An application that is not the lab's: a log-in by form, an order with lines.
SMOKE = [
    HttpStep(
        name="log in",
        method="POST",
        path="/v1/login",
        form={"username": "{user}", "password": "{password}"},
        take={"token": "access.token"},
    ),
    HttpStep(
        name="order",
        method="POST",
        path="/v1/orders",
        headers={"Authorization": "Bearer {token}", "X-Key": "{api_key}"},
        body={"lines": [{"item": "check {random}", "count": 2}]},
        status=[201, 202],
        take={"order": "id", "answer": "reply.text"},
        seconds=2,
    ),
    HttpStep(
        name="read back",
        path="/v1/orders/{order}",
        headers={"Authorization": "Bearer {token}"},
        expect={
            "id": "{order}",
            "lines.#": 1,
            "lines.0.item": "check {random}",
            "lines.-1.count": 2,
            "reply.text": "{answer}",
        },
    ),
]


class Backend:
    """As far as the checks use it; `fault` says what is broken."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.health: list[tuple[int, dict[str, str]]] = []
        self.asked = 0
        self.orders: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    def answer(self, method: str, path: str, body: str, headers: Message) -> tuple[int, Any]:
        if path in ("/ready", "/live"):
            self.asked += path == "/ready"
            return self.health.pop(0) if self.health and path == "/ready" else (200, {"status": "healthy"})
        if path == "/v1/login":
            good = parse_qs(body) == {"username": ["checker"], "password": [PASSWORD]}
            return (200, {"access": {"token": TOKEN}}) if good else (401, {"detail": f"no user with {body} {PASSWORD}"})
        if headers["authorization"] != f"Bearer {TOKEN}":
            return 401, {"detail": f"bad token {headers['authorization']}"}
        if method == "POST":
            return self._order(json.loads(body), headers["x-key"])
        return 200, self.orders[0] if self.fault != "altered" else {
            **self.orders[0],
            "lines": [{"item": "?", "count": 2}],
        }

    def _order(self, body: dict[str, Any], key: str) -> tuple[int, Any]:
        self.keys.add(key)
        self.orders = [{"id": 7, "reply": {"text": "" if self.fault == "empty" else "thank you"}, **body}]
        found = {key: value for key, value in self.orders[0].items() if self.fault != "shape" or key != "reply"}
        return (500, {"detail": f"boom {TOKEN}"}) if self.fault == "status" else (201, found)


@contextmanager
def serving(backend: Backend) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
            status, found = backend.answer(method, self.path, body, self.headers)
            text = b"no JSON" if backend.fault == "text" and status == 201 else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            slow = backend.fault == "slow" and status == 201
            with contextlib.suppress(OSError):  # the client has gone
                for at in range(0, len(text), 1 if slow else len(text)):  # a byte at a time: each read is in time
                    self.wfile.write(text[at : at + 1] if slow else text)
                    self.wfile.flush()
                    if slow:
                        dripping.wait(0.3)

        def log_message(self, format: str, *args: object) -> None:
            return

    dripping = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        dripping.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers of these tests are threads beside them: where one stands still, so does the other."""
    monkeypatch.setattr("tasks.application.health.HEALTH_TIMEOUT_SECONDS", 120.0)


def application(url: str, password: str = PASSWORD, **more: Any) -> Application:
    described: dict[str, Any] = {"health_path": "/ready", "smoke": SMOKE, "user": "checker"}
    secrets = SecretDict({"api_key": "k3y-4717"})
    return Application(url=url, password=SecretStr(password), secrets=secrets, **{**described, **more})


def test_health_needs_several_good_answers_in_a_row_of_every_path_port_and_command(tmp_path: Path) -> None:
    backend, mark = Backend(), tmp_path / "mark"
    bad = (503, {"status": "unhealthy", "database": "unreachable", "redis": "ok"})
    backend.health = [bad, (200, {}), (204, {}), bad, (200, {}), (204, {}), (200, {})]
    command = [sys.executable, "-c", f"import os, pathlib; pathlib.Path('{mark}').write_text(os.environ['api_key'])"]
    with serving(backend) as url:
        port = int(url.rpartition(":")[2])
        many = application(
            url + "/",
            health_path=["/ready", "/live"],
            health_port=port,
            health_command=command,
            health_status=[200, 204],
            frontend_url=url,
            frontend_health_path="/live",
        )
        health = wait_healthy(many, seconds=120, in_a_row=3)
    assert (backend.asked, health.in_a_row, len(health.targets)) == (7, 3, 5)
    assert f"{url}/live and" in health.answer
    assert mark.read_text() == "k3y-4717", "a command gets the secrets by its environment"


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        ({}, "backend answers 503: database unreachable"),
        ({"health_status": [404]}, "backend answers 503: database unreachable"),
        ({"health_path": "", "health_port": 1}, "backend at 127.0.0.1:1 accepts no connections"),
        (
            {"health_path": "", "health_command": ["sh", "-c", "echo oh $OPS_APPLICATION_PASSWORD >&2; exit 3"]},
            "health_command: sh exited 3",
        ),
        (
            {"health_path": "/live", "frontend_url": "http://127.0.0.1:1", "frontend_health_path": "/"},
            "frontend at http://127.0.0.1:1/ does not answer",
        ),
    ],
)
def test_what_is_not_healthy_is_reported_with_its_last_answer_within_the_deadline(
    offered: dict[str, Any], said: str
) -> None:
    backend = Backend()
    backend.health = [(503, {"status": "unhealthy", "database": "unreachable", "redis": "ok"})] * 1000
    started = time.monotonic()
    with serving(backend) as url, pytest.raises(OpsError) as raised:
        wait_healthy(application(url, **offered), seconds=1)
    assert time.monotonic() - started < 100, "not retried: the deadline is the operator's"
    assert said in raised.value.message
    assert PASSWORD not in raised.value.message
    assert "logs" in raised.value.hint


def test_what_is_not_described_is_not_configured_and_no_failure() -> None:
    nothing = Application()
    health, smoke = wait_healthy(nothing), smoke_check(nothing)
    assert (health.configured, smoke.configured, smoke.ok) == (False, False, True)
    assert health.answer == "not configured: [application] has no health check; checked: nothing"
    assert smoke.detail.startswith("not configured")
    assert read_problems(nothing) == {}


def test_the_smoke_checks_go_the_whole_way() -> None:
    backend = Backend()
    with serving(backend) as url:
        result = smoke_check(application(url, smoke_command=["sh", "-c", "echo well at $OPS_APPLICATION_URL"]))
    assert result.ok, result.detail
    assert [row.check for row in result.rows] == ["log in", "order", "read back", "smoke_command"]
    assert result.rows[1].detail == "order: 7, answer: thank you"
    assert result.rows[3].detail == f"well at {url}"
    assert backend.keys == {"k3y-4717"}
    assert TOKEN[:8] not in str(result)
    assert result.detail == "4 checks passed"


@pytest.mark.parametrize(
    ("fault", "failed", "detail"),
    [
        ("status", "order", "answers 500 instead of 201 or 202: boom ********"),
        ("empty", "order", "reply.text of the answer is empty"),
        ("shape", "order", "the answer has no reply.text"),
        ("text", "order", "the answer is no JSON"),
        ("slow", "order", "no answer within 2 s"),
        ("altered", "read back", 'lines.0.item of the answer is "?", expected "check '),
        ("command", "smoke_command", "sh exited 3"),
    ],
)
def test_what_is_broken_is_the_row_that_fails(fault: str, failed: str, detail: str) -> None:
    command = ["sh", "-c", "echo $OPS_APPLICATION_PASSWORD >&2; exit 3" if fault == "command" else "true"]
    with serving(Backend(fault)) as url:
        result = smoke_check(application(url, smoke_command=command))
    assert not result.ok
    first = next(row for row in result.rows if not row.ok)
    assert first.check == failed
    assert detail in first.detail
    assert len(result.rows) == 4
    assert all("not run" in row.detail for row in result.rows[result.rows.index(first) + 1 :])
    assert not any(secret in str(result) for secret in (PASSWORD, TOKEN[:8], "k3y-4717"))


def test_wrong_credentials_and_a_dead_backend_show_no_password() -> None:
    with serving(Backend()) as url:
        refused = smoke_check(application(url, password="wr0ng-4715"))
    dead = smoke_check(application(f"http://127.0.0.1:{free_port()}"))
    assert "log in: POST /v1/login answers 401 instead of 200" in refused.detail
    assert "no answer (ConnectError)" in dead.detail
    assert "wr0ng" not in f"{refused} {dead}"
    assert "-4715" not in f"{refused} {dead}"


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ('smoke = [{ path = "/x", pth = "/y" }]', "smoke.0.pth"),
        ('smoke = [{ path = "x" }]', "a path begins with /"),
        ('smoke = [{ path = "/{order}" }, { path = "/", take = { order = "id" } }]', "{order}, which no step before"),
        ('smoke = [{ path = "/", method = "FETCH" }]', "smoke.0.method"),
        ('writes = { steps = [{ path = "/", stored_in = "t.c", body = "no text" }] }', "a write sends {text}"),
        ('writes = { steps = [{ path = "/", stored_in = "t", body = "{text}" }] }', "write it like table.column"),
        ('ai = { ask = { path = "/", body = "{text}" } }', "takes answer"),
        (
            '[application.secrets_env]\nkey = "OPS_NOWHERE_SET"',
            "1 variable is not set: OPS_NOWHERE_SET ([application] secrets_env.key)",
        ),
        ('frontend_health_path = "/"', "frontend_health_path needs frontend_url"),
    ],
)
def test_a_description_that_cannot_be_carried_out_is_refused_at_once(tmp_path: Path, described: str, said: str) -> None:
    path = tmp_path / "trial.toml"
    path.write_text(
        f'name = "trial"\n[objectives]\nrpo = "1h"\nrto = "1h"\n[application]\nurl = "http://x"\n{described}\n'
    )
    with pytest.raises(OpsError) as raised:
        toml.read(path)
    assert said in f"{raised.value.message} {raised.value.hint}"
    assert "[application]" in raised.value.message


def test_the_example_of_the_documentation_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPS_APPLICATION_PASSWORD", "OPS_APPLICATION_KEY"):
        monkeypatch.setenv(variable, "k3y-4717")
    page = (Path(__file__).parents[3] / "docs" / "application.md").read_text(encoding="utf-8")
    path = tmp_path / "trial.toml"
    text = page.split("```toml\n")[1].split("```")[0]
    path.write_text(f'name = "trial"\n[objectives]\nrpo = "1h"\nrto = "1h"\n[services]\nnames = {{}}\n{text}')
    read = toml.read(path)
    assert [step.title for step in read.application.smoke] == ["log in", "order", "read back"]
    assert read.logs.field("timestamp") == "ts"


def test_the_block_keeps_the_description_and_hides_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is registered and loaded again."""
    monkeypatch.setenv("OPS_TRIAL_KEY", "k3y-4717")
    path = tmp_path / "trial.toml"
    path.write_text(
        'name = "trial"\n[objectives]\nrpo = "1h"\nrto = "1h"\n[services]\nnames = {}\n[application]\nurl = "http://x"\n'
        'secrets_env = { api_key = "OPS_TRIAL_KEY" }\n'
        'smoke = [{ path = "/x", headers = { X-Key = "{api_key}" }, status = 204, expect = { "n.#" = 2 } }]\n'
    )
    read = toml.read(path).application
    stored = json.loads(json.dumps(read.model_dump(mode="json", context={"include_secrets": True})))
    again = Application.model_validate({key: value for key, value in stored.items() if key in Application.model_fields})
    assert (again.smoke, again.secrets.get_secret_value()) == (read.smoke, {"api_key": "k3y-4717"})
    assert again.smoke[0].status == [204]
    assert "k3y" not in f"{read!r} {read.model_dump_json()}"
