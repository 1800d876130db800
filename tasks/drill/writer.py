"""A client that writes through the application, and records every answer in a ledger.

    ledger = Ledger(path)
    with Writer(application, ledger, per_second=10):
        ...                                       # break things
    find_lost_writes(ledger, dsn, application).sentence   # which acknowledged writes are missing

It continues while the application is down. `[application.writes]` describes its requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from blocks.http_step import TEXT, HttpStep, StepFailed, WriteStep
from blocks.places import Application
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.application.http_steps import HttpAnswer, NotAnswered, StepClient
from tasks.drill.ledger import WriteLedger, text_of

TIMEOUT_SECONDS = 5.0
LOGIN_SECONDS = 60.0
UNAUTHORISED = 401
NOT_DESCRIBED = "[[application.writes.steps]] is not configured: a drill's client cannot write"
DESCRIBE = "describe a write of the application (docs/application.md)"


def require_writes(application: Application) -> None:
    """Raises OpsError if the environment describes no write for a drill's client."""
    if not application.writes.steps:
        raise OpsError(NOT_DESCRIBED, DESCRIBE)


class Writer:
    """Writes from its own thread while the block runs: the first of the described steps each time, each other step
    every `every` writes (the argument overrides the steps'), when the values that it needs are known.

    It continues while the application is down, and logs in again after a 401. `url` may be a function that returns the
    address of now: it is called before every request.

    Raises:
        OpsError: no write is described, or the first log-in fails.
    """

    def __init__(
        self,
        application: Application,
        ledger: WriteLedger,
        *,
        url: str | Callable[[], str] = "",
        per_second: float = 10,
        every: int = 0,
    ) -> None:
        require_writes(application)
        self.ledger = ledger
        self._login = [_hurried(step) for step in application.writes.login]
        self._first, *self._others = [_hurried(step) for step in application.writes.steps]
        self._every = {step.title: every or step.every for step in self._others}
        self._user = application.user or "the drill's client"
        self._pause = 1 / per_second
        self._url = url or application.url
        self._client = StepClient(application, [*self._login, self._first, *self._others])
        self._logged_in = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        until(
            self._log_in,
            what=f"the log-in of {self._user}",
            seconds=LOGIN_SECONDS,
            hint="check the application's health",
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._client.__exit__(None, None, None)
        self.ledger.close()
        if self._failure and error is None:
            raise OpsError(f"the writer ended early: {self._failure}") from self._failure

    def _work(self) -> None:
        try:
            count, due = 0, time.monotonic()
            while not self._stop.is_set():
                if self._logged_in or self._logged_in_again():
                    count += 1
                    self._write(self._step(count))
                due = max(due + self._pause, time.monotonic() - 1)  # it does not catch up after an outage
                self._stop.wait(max(0.0, due - time.monotonic()))
        except BaseException as error:
            self._failure = error

    def _step(self, count: int) -> WriteStep:
        known = {*self._client.values, TEXT}
        due = (one for one in self._others if count % self._every[one.title] == 0 and one.used <= known)
        return next(due, self._first)

    def _write(self, step: WriteStep) -> None:
        attempt = self.ledger.intend(step.title)
        try:
            answer = self._send(step, attempt)
        except NotAnswered as error:
            self.ledger.answer(attempt, "indeterminate" if error.sent else "refused", why=str(error))
        else:
            self._record(attempt, step, answer)

    def _send(self, step: WriteStep, attempt: str) -> HttpAnswer:
        self._client.url = self._url if isinstance(self._url, str) else self._url()
        return self._client.send(step, **{TEXT: text_of(attempt)})

    def _record(self, attempt: str, step: WriteStep, answer: HttpAnswer) -> None:
        if answer.status in step.status:
            self.ledger.answer(attempt, "acknowledged", key=self._key(step, answer, attempt))
            return
        # A connection that was lost during COMMIT is answered with 503 too.
        refused = 400 <= answer.status < 500
        self.ledger.answer(attempt, "refused" if refused else "indeterminate", why=str(answer.status))
        if answer.status == UNAUTHORISED:
            self._logged_in = False
        elif step is not self._first:  # its values may be of a deleted row: the next first step gets new ones
            for name in self._first.take:
                self._client.values.pop(name, None)

    def _key(self, step: WriteStep, answer: HttpAnswer, attempt: str) -> str:
        """The first value that the step takes, for the report."""
        try:
            taken = self._client.judge(step, answer, **{TEXT: text_of(attempt)})
        except StepFailed:
            return ""
        return str(next(iter(taken.values()), ""))

    def _logged_in_again(self) -> bool:
        try:
            return self._log_in()
        except OpsError:
            return False

    def _log_in(self) -> bool:
        self._client.url = self._url if isinstance(self._url, str) else self._url()
        for step in self._login:
            try:
                answer = self._client.send(step)
                if 400 <= answer.status < 500 and answer.status not in step.status:
                    raise OpsError(
                        f"the application refuses {self._user}: {answer.status}",
                        "correct [application] user and password_env, or writes.login",
                    )
                self._client.judge(step, answer)
            except StepFailed as error:
                raise Unreachable(f"the application does not answer: {error}") from None
        self._logged_in = True
        return True


Step = TypeVar("Step", bound=HttpStep)


def _hurried(step: Step) -> Step:
    """With a shorter timeout: a waiting client writes nothing."""
    return step.model_copy(update={"seconds": min(step.seconds, TIMEOUT_SECONDS)})
