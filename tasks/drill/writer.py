"""A client that keeps writing through the application, and keeps a ledger of what it was told.

    ledger = Ledger(path)
    with Writer(application_url, password, ledger, per_second=10):
        ...                          # break things
    account_of(ledger, dsn).sentence # which acknowledged writes are gone

It goes on while the application is down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import httpx

from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.drill.ledger import Kind, Ledger, text_of

USER = "monitor"
TIMEOUT_SECONDS = 5.0
LOGIN_SECONDS = 60.0
# The application allows a user 100 AI answers an hour (AI_RATE_LIMIT), and a recovery's smoke check needs one of them.
MESSAGE_EVERY = 25


class Writer:
    """Writes from a thread of its own while the block runs: a session each time, now and then a message in one.

    It goes on while the application is down, and logs in again when its session is gone. `url` may be a function that
    says where users are sent now (`Lab.endpoint`): it is asked before every request.

    Raises:
        OpsError: it cannot log in at first.
    """

    def __init__(
        self,
        url: str | Callable[[], str],
        password: str,
        ledger: Ledger,
        *,
        user: str = USER,
        per_second: float = 10,
        message_every: int = MESSAGE_EVERY,
    ) -> None:
        self.ledger = ledger
        self._user = user
        self._password = password
        self._pause = 1 / per_second
        self._message_every = message_every
        self._url = url
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)
        self._session = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        until(self._log_in, what=f"the log-in of {self._user}", seconds=LOGIN_SECONDS, hint="see what its /health says")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()
        self.ledger.close()
        if self._failure and error is None:
            raise OpsError(f"the writer ended early: {self._failure}") from self._failure

    def _work(self) -> None:
        try:
            count, due = 0, time.monotonic()
            while not self._stop.is_set():
                if "Authorization" in self._client.headers or self._logged_in_again():
                    count += 1
                    self._write("message" if self._session and count % self._message_every == 0 else "session")
                due = max(due + self._pause, time.monotonic() - 1)  # after an outage it does not catch up
                self._stop.wait(max(0.0, due - time.monotonic()))
        except BaseException as error:
            self._failure = error

    def _write(self, kind: Kind) -> None:
        attempt = self.ledger.intend(kind)
        path, body = "/api/interview/sessions", {"position": text_of(attempt)}
        if kind == "message":
            path, body = f"{path}/{self._session}/messages", {"content": text_of(attempt)}
        try:
            answer = self._post(path, body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self.ledger.answer(attempt, "refused", why=type(error).__name__)
        except httpx.HTTPError as error:
            self.ledger.answer(attempt, "indeterminate", why=type(error).__name__)
        else:
            self._book(attempt, kind, answer)

    def _post(self, path: str, body: dict[str, str]) -> httpx.Response:
        self._client.base_url = httpx.URL(self._url if isinstance(self._url, str) else self._url())
        return self._client.post(path, json=body)

    def _book(self, attempt: str, kind: Kind, answer: httpx.Response) -> None:
        if answer.status_code == httpx.codes.CREATED:
            key = str(answer.json()["session_id" if kind == "session" else "message_id"])
            self.ledger.answer(attempt, "acknowledged", key=key)
            self._session = key if kind == "session" else self._session
            return
        # 503 is also the answer to a connection that was lost during COMMIT.
        refused = answer.is_client_error
        self.ledger.answer(attempt, "refused" if refused else "indeterminate", why=str(answer.status_code))
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            del self._client.headers["Authorization"]
        elif kind == "message":  # the session may be gone, or the limit of AI answers reached
            self._session = ""

    def _logged_in_again(self) -> bool:
        try:
            return self._log_in()
        except OpsError:
            return False

    def _log_in(self) -> bool:
        try:
            answer = self._post("/api/auth/login", {"username": self._user, "password": self._password})
        except httpx.HTTPError as error:
            raise Unreachable(f"the application does not answer ({type(error).__name__})") from None
        if answer.is_client_error:
            raise OpsError(
                f"the application refuses {self._user}: {answer.status_code}", "set OPS_APPLICATION_PASSWORD"
            )
        if not answer.is_success:
            raise Unreachable(f"the application answers {answer.status_code}")
        self._client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
        return True
