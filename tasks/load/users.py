"""The users of a load test. A program of Locust's (`python -m locust -f`), which a flow never imports: Locust replaces
the sockets and threads of the whole process.

All of them log in as the one user of the smoke checks; `OPS_LOAD_AI_ANSWERS` is how often an AI is asked at most, by
all together: each answer costs money.
"""

from __future__ import annotations

import itertools
import os
import uuid
from typing import Any

from locust import HttpUser, between, task

from tasks.load.names import ASK, CREATE, LIMITED, LOG_IN, READ

POSITION = "負荷試験 (interview-ops)"
TIMEOUT_SECONDS = 30.0
OK, CREATED, UNAUTHORISED, TOO_MANY = 200, 201, 401, 429
SESSIONS = "/api/interview/sessions"

_questions = itertools.count(1)
_most = int(os.environ.get("OPS_LOAD_AI_ANSWERS", "0"))


class Candidate(HttpUser):
    """Somebody in an interview: reads mostly, answers sometimes, begins anew seldom."""

    wait_time = between(0.2, 1.0)
    session = ""

    def on_start(self) -> None:
        """Everybody goes the whole way once, so that each endpoint is measured; then by chance."""
        self.log_in()
        self.create()
        self.ask()
        self.read()

    @task(1)
    def log_in(self) -> None:
        login = {"username": os.environ["OPS_LOAD_USER"], "password": os.environ["OPS_LOAD_PASSWORD"]}
        self.client.headers.pop("Authorization", None)
        body = self._call("POST", "/api/auth/login", LOG_IN, OK, login)
        if body.get("token"):
            self.client.headers["Authorization"] = f"Bearer {body['token']}"

    @task(2)
    def create(self) -> None:
        self.session = str(self._call("POST", SESSIONS, CREATE, CREATED, {"position": POSITION}).get("session_id", ""))

    @task(4)
    def ask(self) -> None:
        """Its own text each time: an answer from the cache would measure no AI."""
        if self.session and next(_questions) <= _most:
            path, text = f"{SESSIONS}/{self.session}/messages", f"負荷試験の質問です。{uuid.uuid4()}"
            self._call("POST", path, ASK, CREATED, {"content": text})

    @task(8)
    def read(self) -> None:
        if self.session:
            self._call("GET", f"{SESSIONS}/{self.session}", READ, OK)

    def _call(self, method: str, path: str, name: str, expected: int, body: Any = None) -> dict[str, Any]:
        """What the answer holds; nothing where it is not the expected one."""
        with self.client.request(
            method, path, name=name, json=body, timeout=TIMEOUT_SECONDS, catch_response=True
        ) as answer:
            if answer.status_code == TOO_MANY and name == ASK:
                answer.request_meta["name"] = LIMITED  # the limit works; it is no answer either
                answer.success()
                return {}
            if answer.status_code != expected:
                answer.failure(f"{answer.status_code or 'no answer'} instead of {expected}")
                return {}
            try:
                found: dict[str, Any] = answer.json()
            except ValueError:
                answer.failure("the answer is no JSON")
                return {}
            if "session_id" not in found and name in (CREATE, READ):
                answer.failure("the answer has no session_id")
            return found
