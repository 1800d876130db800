"""What a user gets from the AI through the application: an interview of the operators' own user."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from blocks.places import Application
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from tasks.application import json_object

SECONDS = 60.0
POSITION = "フォールバック訓練 (interview-ops)"
SHOWN = 200


@dataclass(frozen=True)
class Interview:
    """One that has begun."""

    url: str
    session: str
    token: SecretStr


@dataclass(frozen=True)
class Reply:
    """To one question: by whom, or with which status and words it was refused. `status` is 0 without any answer."""

    question: str
    status: int
    provider: str
    model: str
    said: str
    seconds: float

    @property
    def answered(self) -> bool:
        """Whether the user got an answer of an AI."""
        return self.status == httpx.codes.CREATED and bool(self.provider)

    @property
    def told(self) -> str:
        """For people."""
        what = f"{self.provider} ({self.model})" if self.answered else f"{self.status or 'no answer'} “{self.said}”"
        return f"{what} after {self.seconds:.2f} s"


@action
def begin_interview(application: Application) -> Interview:
    """Log in and begin an interview; it stays there, with the position フォールバック訓練.

    Raises:
        Unreachable: the application does not answer.
        OpsError: it refuses.
    """
    login = {"username": application.user, "password": application.password.get_secret_value()}
    body = _asked(application.url, "POST", "/api/auth/login", 200, "", login)
    token = str(body.get("token", ""))
    body = _asked(application.url, "POST", "/api/interview/sessions", 201, token, {"position": POSITION})
    return Interview(application.url, str(body.get("session_id", "")), SecretStr(token))


@action
def ask_application(interview: Interview) -> Reply:
    """One question, unlike all others: an answer from the cache would prove nothing. A refusal is a result too."""
    question, started = f"訓練の質問です。{uuid.uuid4()}", time.monotonic()
    path = f"/api/interview/sessions/{interview.session}/messages"
    try:
        answer = _send(interview.url, "POST", path, interview.token.get_secret_value(), {"content": question})
    except httpx.HTTPError as error:
        return Reply(question, 0, "", "", type(error).__name__, time.monotonic() - started)
    seconds, body = time.monotonic() - started, json_object(answer)
    reply = body.get("reply")
    if answer.status_code == httpx.codes.CREATED and isinstance(reply, dict) and str(reply.get("content", "")).strip():
        return Reply(question, 201, str(reply.get("provider", "")), str(reply.get("model", "")), "", seconds)
    said = str(body.get("detail") or answer.text)[:SHOWN]
    return Reply(question, answer.status_code, "", "", said, seconds)


@probe
def read_questions(interview: Interview) -> dict[str, int]:
    """What of the interview is stored: each text of the user → how many messages follow it up to the next one.

    Raises:
        Unreachable, OpsError: it cannot be read.
    """
    path = f"/api/interview/sessions/{interview.session}"
    body = _asked(interview.url, "GET", path, 200, interview.token.get_secret_value())
    found, last = dict[str, int](), ""
    for message in body.get("messages", []):
        if message["role"] == "user":
            last = str(message["content"])
            found[last] = 0
        elif last:
            found[last] += 1
    return found


def _asked(url: str, method: str, path: str, expected: int, token: str, body: Any = None) -> dict[str, Any]:
    hint = "look at the application's log, and at [application] user and password_env"
    try:
        answer = _send(url, method, path, token, body)
    except httpx.HTTPError as error:
        raise Unreachable(f"{method} {path} of the application: no answer ({type(error).__name__})", hint) from None
    if answer.status_code != expected:
        said = str(json_object(answer).get("detail", answer.reason_phrase))[:SHOWN]
        raise OpsError(f"{method} {path} of the application answers {answer.status_code}: {said}", hint)
    return json_object(answer)


def _send(url: str, method: str, path: str, token: str, body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
        return client.request(method, path, headers=headers, json=body)
