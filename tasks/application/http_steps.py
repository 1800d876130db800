"""Requests that an environment's TOML describes, sent one after the other by one client.

Smoke checks, a drill's writes and a user's question to the AI all use it; the load generator shares the descriptions
(blocks.http_step). Secrets never reach a message: their values, and the values that headers carry, are masked.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import httpx

from blocks.http_step import HttpStep, StepFailed
from blocks.places import Application
from runbook.masking import SHORT, without

MOST_BYTES = 16 << 20
SHOWN = 300


class NotAnswered(StepFailed):
    """Nothing usable came back. `sent` is false where the connection was refused: the application has seen nothing."""

    def __init__(self, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.sent = sent


@dataclass(frozen=True)
class Answer:
    """What came back, before it is judged."""

    status: int
    content: bytes


def secrets_of(application: Application) -> frozenset[str]:
    """What must not stand in any message."""
    named = map(str, application.secrets.get_secret_value().values())
    return frozenset({application.password.get_secret_value(), *named} - {""})


def values_of(application: Application) -> dict[str, object]:
    """Name → value, as far as the environment gives them; `random` is new each time."""
    return {
        "user": application.user,
        "password": application.password.get_secret_value(),
        "now": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "random": uuid.uuid4().hex,
        **{name: str(value) for name, value in application.secrets.get_secret_value().items()},
    }


class StepClient:
    """A client with the values that its steps took so far. Cookies are kept between steps. `steps` are those that it
    will send: what their headers carry is masked from the beginning.

    `url` may be changed between two steps: users may be sent elsewhere.
    """

    def __init__(self, application: Application, steps: Sequence[HttpStep] = (), url: str = "") -> None:
        self.url = url or application.url
        # What a header carries is a token, as a rule: hidden as soon as it is taken.
        self._tokens = {name for step in steps for name in HttpStep(path="/", headers=step.headers).used}
        self.values = values_of(application)
        self._hidden = set(secrets_of(application))
        # Never through a proxy: an internal address would be asked of it.
        self._client = httpx.Client(trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(self, step: HttpStep, **more: object) -> dict[str, object]:
        """Send a step, judge its answer, keep what it takes. `more` are values for this step alone.

        Raises:
            NotAnswered: no answer within its deadline.
            StepFailed: another answer than the described one.
        """
        return self.judge(step, self.send(step, **more), **more)

    def send(self, step: HttpStep, **more: object) -> Answer:
        """The answer to a step, whatever it is.

        Raises:
            NotAnswered: there is none within its deadline.
            StepFailed: a name that the step uses has no value.
        """
        request = step.request({**self.values, **more})
        self._hide(request.headers.values())
        what, end = f"{step.method} {step.path}", time.monotonic() + step.seconds
        late = f"{what}: no answer within {step.seconds:g} s"
        try:
            with self._client.stream(
                request.method, self.url.rstrip("/") + request.path, timeout=step.seconds, **request.arguments
            ) as answer:
                content = b""
                for chunk in answer.iter_bytes():
                    content += chunk
                    if time.monotonic() > end:
                        raise NotAnswered(late, sent=True)
                    if len(content) > MOST_BYTES:
                        raise NotAnswered(f"{what}: the answer has more than {MOST_BYTES >> 20} MiB", sent=True)
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
                raise NotAnswered(late, sent=True) from None
            refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise NotAnswered(f"{what}: no answer ({type(error).__name__})", sent=not refused) from None
        except httpx.InvalidURL:
            raise NotAnswered(f"{what}: the address is wrong", sent=False) from None
        return Answer(answer.status_code, content)

    def judge(self, step: HttpStep, answer: Answer, **more: object) -> dict[str, object]:
        """Keep what a step takes from an answer, and return it.

        Raises:
            StepFailed: another answer than the described one.
        """
        try:
            taken = step.judge(answer.status, answer.content, {**self.values, **more})
        except StepFailed as error:
            raise StepFailed(self.masked(str(error))[:SHOWN]) from None  # masked first: half a secret is one too
        self.values |= taken
        self._hidden |= {str(value) for name, value in taken.items() if name in self._tokens}
        return taken

    def masked(self, text: str) -> str:
        """A text without the secrets that this client knows."""
        return without(text, (one for one in self._hidden if len(one) >= SHORT))

    def _hide(self, headers: Iterable[str]) -> None:
        """A token of the application's is a secret too: `Bearer …`."""
        self._hidden.update(word for value in headers for word in (value, *value.split()[1:]))
