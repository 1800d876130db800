"""Requests that an environment's TOML describes, sent in order by one client.

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
    """No usable answer. `sent`: false if the connection was refused, so that the application received nothing."""

    def __init__(self, text: str, *, sent: bool) -> None:
        super().__init__(text)
        self.sent = sent


@dataclass(frozen=True)
class HttpAnswer:
    """An answer before it is judged."""

    status: int
    content: bytes


def secrets_of(application: Application) -> frozenset[str]:
    """The secrets that no message may contain."""
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
    """A client with the values that its steps have read so far; it keeps cookies. `steps`: the steps that it will send,
    so that the values in their headers are masked from the start.

    `url` may change between two steps, e.g. after a failover of the region.
    """

    def __init__(self, application: Application, steps: Sequence[HttpStep] = (), url: str = "") -> None:
        self.url = url or application.url
        # A value in a header is usually a token: masked as soon as it is read.
        self._tokens = {name for step in steps for name in HttpStep(path="/", headers=step.headers).used}
        self.values = values_of(application)
        self._hidden = set(secrets_of(application))
        # Never through a proxy: it may not know an internal address.
        self._client = httpx.Client(trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(self, step: HttpStep, **more: object) -> dict[str, object]:
        """Send a step, judge its answer, keep the values that it reads. `more`: values for this step only.

        Raises:
            NotAnswered: no answer within its deadline.
            StepFailed: the answer differs from the described one.
        """
        return self.judge(step, self.send(step, **more), **more)

    def send(self, step: HttpStep, **more: object) -> HttpAnswer:
        """Send a step; returns any answer.

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
        return HttpAnswer(answer.status_code, content)

    def judge(self, step: HttpStep, answer: HttpAnswer, **more: object) -> dict[str, object]:
        """Check an answer; keep and return the values that the step reads from it.

        Raises:
            StepFailed: the answer differs from the described one.
        """
        try:
            taken = step.judge(answer.status, answer.content, {**self.values, **more})
        except StepFailed as error:
            raise StepFailed(
                self.masked(str(error))[:SHOWN]
            ) from None  # mask before cutting: a part of a secret is secret too
        self.values |= taken
        self._hidden |= {str(value) for name, value in taken.items() if name in self._tokens}
        return taken

    def masked(self, text: str) -> str:
        """Mask the secrets that this client knows."""
        return without(text, (one for one in self._hidden if len(one) >= SHORT))

    def _hide(self, headers: Iterable[str]) -> None:
        """Mask tokens in headers too: `Bearer …`."""
        self._hidden.update(word for value in headers for word in (value, *value.split()[1:]))
