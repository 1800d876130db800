"""What a user gets from the AI through the application, by the question that `[application.ai]` describes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blocks.http_step import TEXT, HttpStep, StepFailed, reason_in, strings_in
from blocks.places import Application
from runbook.errors import OpsError, Unreachable
from runbook.kinds import action, probe
from tasks.application.http_steps import Answer, NotAnswered, StepClient

SHOWN = 200
NOT_DESCRIBED = "[application.ai] ask is not configured: there is no question for the AI"
DESCRIBE = "describe a user's question to the AI (docs/application.md)"
HINT = "look at the application's log, and at [application.ai]"


@dataclass(frozen=True)
class Interview:
    """One that has begun: the client keeps what its log-in and its session took."""

    client: StepClient
    ask: HttpStep
    stored: HttpStep | None


@dataclass(frozen=True)
class Reply:
    """To one question: by whom, or with which status and words it was refused. `status` is 0 without any answer."""

    question: str
    status: int
    provider: str
    model: str
    said: str
    seconds: float
    answer: str = ""

    @property
    def answered(self) -> bool:
        """Whether the user got an answer of an AI."""
        return bool(self.answer)

    @property
    def told(self) -> str:
        """For people."""
        who = f"{self.provider or 'an unnamed provider'} ({self.model or 'an unnamed model'})"
        what = who if self.answered else f"{self.status or 'no answer'} “{self.said}”"
        return f"{what} after {self.seconds:.2f} s"


@dataclass(frozen=True)
class Stored:
    """What of an interview is stored: every text of the answer to the described step."""

    texts: frozenset[str]

    def halves(self, replies: Sequence[Reply]) -> list[str]:
        """Questions that are half stored: an answered one without its answer, or a refused one at all."""
        return [one.question for one in replies if not self._is_whole(one)]

    def _is_whole(self, reply: Reply) -> bool:
        if not reply.answered:
            return reply.question not in self.texts
        return reply.question in self.texts and reply.answer in self.texts


def require_question(application: Application) -> None:
    """Raises OpsError where the environment describes no question to the AI."""
    if application.ai.ask is None:
        raise OpsError(NOT_DESCRIBED, DESCRIBE)


@action
def begin_interview(application: Application) -> Interview:
    """Send the described steps before a question, e.g. a log-in; what they create stays there.

    Raises:
        Unreachable: the application does not answer.
        OpsError: it refuses, or no question is described.
    """
    require_question(application)
    described = application.ai
    assert described.ask
    steps = [*described.before, described.ask, *([described.stored] if described.stored else [])]
    client = StepClient(application, steps)
    for step in described.before:
        _asked(client, step)
    return Interview(client, described.ask, described.stored)


@action
def ask_application(interview: Interview) -> Reply:
    """One question, unlike all others: an answer from the cache would prove nothing. A refusal is a result too."""
    question, started = f"訓練の質問です。{uuid.uuid4()}", time.monotonic()
    client, step = interview.client, interview.ask
    try:
        answer = client.send(step, **{TEXT: question})
    except NotAnswered as error:
        return Reply(question, 0, "", "", str(error)[:SHOWN], time.monotonic() - started)
    seconds = time.monotonic() - started
    try:
        taken = client.judge(step, answer, **{TEXT: question})
    except StepFailed as error:
        said = str(error) if answer.status in step.status else client.masked(reason_in(answer.content))
        return Reply(question, answer.status, "", "", said[:SHOWN], seconds)
    who, model = (str(taken.get(name, "")) for name in ("provider", "model"))
    return Reply(question, answer.status, who, model, "", seconds, str(taken["answer"]))


@probe
def read_stored(interview: Interview) -> Stored | None:
    """What is stored of it; None where `[application.ai] stored` is not described.

    Raises:
        Unreachable, OpsError: it cannot be read.
    """
    if interview.stored is None:
        return None
    answer = _asked(interview.client, interview.stored)
    try:
        body: Any = json.loads(answer.content)
    except ValueError:
        raise OpsError(f"{interview.stored.title}: the answer is no JSON", HINT) from None
    return Stored(frozenset(strings_in(body)))


def _asked(client: StepClient, step: HttpStep) -> Answer:
    try:
        answer = client.send(step)
        client.judge(step, answer)
    except NotAnswered as error:
        raise Unreachable(f"the application: {error}", HINT) from None
    except StepFailed as error:
        raise OpsError(f"the application: {step.title}: {error}", HINT) from None
    return answer
