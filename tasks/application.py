"""The interview application as its users see it: whether it is healthy, and whether the whole path works."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx

from blocks.places import Application
from blocks.services import Services
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.services import refuse_ended

HEALTH_TIMEOUT_SECONDS = 3.0
ONCE_SECONDS = 10.0  # a health that takes longer is none
TIMEOUT_SECONDS = 30.0  # what has just come back answers slowly
AI_TIMEOUT_SECONDS = 60.0
EVERY_SECONDS = 0.25
POSITION = "動作確認 (interview-ops)"


@dataclass(frozen=True)
class Health:
    """What answered, how many times in a row, and how long it took until then."""

    urls: tuple[str, ...]
    in_a_row: int
    seconds: float

    @property
    def answer(self) -> str:
        """For a report."""
        return f"{' and '.join(self.urls)} answered well {self.in_a_row} times in a row after {self.seconds:.1f} s"


class Check(NamedTuple):
    """One row of phase 5."""

    check: str
    ok: bool
    seconds: float
    detail: str


@dataclass(frozen=True)
class SmokeResult:
    """The checks in order; after the first that fails the others are not run, and not ok."""

    rows: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.ok for row in self.rows)

    @property
    def detail(self) -> str:
        """The first failure, or that all is well."""
        bad = next((row for row in self.rows if not row.ok), None)
        return f"{bad.check}: {bad.detail}" if bad else f"{len(self.rows)} checks passed"


def require_address(application: Application) -> None:
    """
    Raises:
        OpsError: neither backend nor frontend has one: nobody would be asked.
    """
    if not application.url and not application.frontend_url:
        raise OpsError("no address of the application is named", "add url, or frontend_url, under [application]")


@probe
def wait_healthy(
    application: Application, *, seconds: float = 120, in_a_row: int = 3, services: Services | None = None
) -> Health:
    """Ask `/health` of backend and frontend until both answered well `in_a_row` times in a row (§8.2, step 7).

    Raises:
        OpsError: that did not happen within `seconds`; the last bad answer is in the message. Or one of `services` has
            ended for good: nobody waits for it.
    """
    addresses = [("backend", application.url), ("frontend", application.frontend_url)]
    urls = [(name, url.rstrip("/") + "/health") for name, url in addresses if url]
    started, good, last = time.monotonic(), 0, "nothing was asked"

    def enough() -> bool:
        nonlocal good, last
        problem = next(filter(None, (_problem(client, name, url) for name, url in urls)), "")
        good, last = (0, problem) if problem else (good + 1, last)
        if problem and services:
            for role in services.names.keys() & {name for name, _ in urls}:
                refuse_ended(services, role)
        return good >= in_a_row

    with _client(HEALTH_TIMEOUT_SECONDS) as client:
        try:
            until(enough, what="health", seconds=seconds, every_seconds=EVERY_SECONDS)
        except Unreachable:
            raise OpsError(
                f"the application is not healthy after {seconds:.0f} s: {last}",
                "look at the logs of backend and frontend, and at what the answer names",
            ) from None
    return Health(tuple(url for _, url in urls), good, time.monotonic() - started)


@probe
def read_problems(application: Application) -> dict[str, str]:
    """What backend and frontend answer when they are asked once: role → what is wrong, "" where nothing is."""
    addresses = {"backend": application.url, "frontend": application.frontend_url}
    with _client(ONCE_SECONDS) as client:
        return {name: _problem(client, name, url.rstrip("/") + "/health") for name, url in addresses.items() if url}


def _problem(client: httpx.Client, name: str, url: str) -> str:
    """What is wrong with one address, e.g. "backend answers 503: database unreachable"; empty when it is well."""
    try:
        answer = client.get(url)
    except httpx.HTTPError as error:
        return f"{name} at {url} does not answer ({type(error).__name__})"
    if answer.status_code == httpx.codes.OK:
        return ""
    body = json_object(answer)
    parts = [f"{part} {state}" for part, state in body.items() if part != "status" and state != "ok"]
    return f"{name} answers {answer.status_code}: {', '.join(parts)[:200] or answer.reason_phrase}"


@action
def smoke_check(application: Application) -> SmokeResult:
    """Phase 5 of §8.4: log in, begin an interview, get an AI's answer, read everything back and compare.

    It leaves one session of the smoke checks' own user behind, with the position 動作確認. What fails is a row that is
    not ok, never an error; the password is in none of them.
    """
    run = _Smoke(application)
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("ログイン", run.log_in),
        ("面接セッション作成", run.create_session),
        ("AI応答", run.get_reply),
        ("データ読み書き", run.read_back),
    )
    rows: list[Check] = []
    with run.client:
        for name, check in checks:
            if rows and not rows[-1].ok:
                rows.append(Check(name, False, 0.0, "not run: the check before failed"))
                continue
            started = time.monotonic()
            try:
                detail, ok = check(), True
            except _Failed as error:
                detail, ok = str(error), False
            rows.append(Check(name, ok, round(time.monotonic() - started, 3), detail))
    return SmokeResult(tuple(rows))


class _Failed(Exception):
    """A check did not pass; its text is the row's detail."""


class _Smoke:
    """The state between the checks: token, session, and what was sent and answered."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.client = _client(TIMEOUT_SECONDS, base_url=application.url)
        self.session = ""
        # Its own text each time: an answer from the cache would prove nothing about the AI.
        self.sent = f"動作確認です。{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {uuid.uuid4()}"
        self.stored: list[tuple[int, str, str]] = []

    def log_in(self) -> str:
        login = {"username": self.application.user, "password": self.application.password.get_secret_value()}
        body = self._call("POST", "/api/auth/login", 200, login)
        self.client.headers["Authorization"] = f"Bearer {_field(body, 'token')}"
        return f"as {self.application.user}"

    def create_session(self) -> str:
        body = self._call("POST", "/api/interview/sessions", 201, {"position": POSITION})
        self.session = str(_field(body, "session_id"))
        return f"session {self.session}"

    def get_reply(self) -> str:
        path = f"/api/interview/sessions/{self.session}/messages"
        body = self._call("POST", path, 201, {"content": self.sent}, timeout=AI_TIMEOUT_SECONDS)
        reply = _field(body, "reply")
        content = str(_field(reply, "content"))
        if not content.strip():
            raise _Failed("the AI's answer is empty")
        question = (int(_field(body, "message_id")), "user", self.sent)
        self.stored = [question, (int(_field(reply, "message_id")), "assistant", content)]
        return f"{_field(reply, 'provider')} {_field(reply, 'model')}, {len(content)} characters"

    def read_back(self) -> str:
        body = self._call("GET", f"/api/interview/sessions/{self.session}", 200)
        if str(_field(body, "session_id")) != self.session or _field(body, "position") != POSITION:
            raise _Failed("another session came back")
        read = [
            (int(_field(m, "message_id")), _field(m, "role"), _field(m, "content")) for m in _field(body, "messages")
        ]
        if read != self.stored:
            raise _Failed(f"what was read differs from what was written: {len(read)} messages of {len(self.stored)}")
        return f"{len(read)} messages, as written"

    def _call(
        self, method: str, path: str, expected: int, body: Any = None, timeout: float = TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        try:
            answer = self.client.request(method, path, json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise _Failed(f"{method} {path}: no answer ({type(error).__name__})") from None
        if answer.status_code != expected:
            detail = str(json_object(answer).get("detail", answer.reason_phrase))[:200]
            raise _Failed(f"{method} {path} answers {answer.status_code} instead of {expected}: {detail}")
        return json_object(answer)


def _field(body: Any, name: str) -> Any:
    if not isinstance(body, dict) or name not in body:
        raise _Failed(f"the answer has no {name}")
    return body[name]


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """What an answer holds; nothing where it is something else."""
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _client(timeout: float, base_url: str = "") -> httpx.Client:
    """Never through a proxy: an internal address would be asked of it."""
    return httpx.Client(timeout=timeout, base_url=base_url, trust_env=False)
