"""A user's question to the AI through the application, as `[application.ai]` describes it."""

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
from tasks.application.http_steps import HttpAnswer, NotAnswered, StepClient

SHOWN = 200
NOT_DESCRIBED = "[application.ai] ask is not configured: there is no question for the AI"
DESCRIBE = "describe a user's question to the AI (docs/application.md)"
HINT = "check the application's log, and [application.ai]"


@dataclass(frozen=True)
class Interview:
    """A started interview; the client has the values of its login and its session."""

    client: StepClient
    ask: HttpStep
    stored: HttpStep | None


@dataclass(frozen=True)
class InterviewReply:
    """The reply to one question: the provider, or the status and the message of a refusal. `status`: 0 without a
    reply."""

    question: str
    status: int
    provider: str
    model: str
    said: str
    seconds: float
    answer: str = ""

    @property
    def answered(self) -> bool:
        """Whether the user got an answer from an AI."""
        return bool(self.answer)

    @property
    def text(self) -> str:
        """Provider and model, or the refusal, with the seconds."""
        who = f"{self.provider or 'an unnamed provider'} ({self.model or 'an unnamed model'})"
        what = who if self.answered else f"{self.status or 'no answer'} “{self.said}”"
        return f"{what} after {self.seconds:.2f} s"


@dataclass(frozen=True)
class StoredReply:
    """The stored texts of an interview: all strings of the answer to the step `stored`."""

    texts: frozenset[str]

    def halves(self, replies: Sequence[InterviewReply]) -> list[str]:
        """Half stored questions: answered ones without their answer, and refused ones that are stored."""
        return [one.question for one in replies if not self._is_whole(one)]

    def _is_whole(self, reply: InterviewReply) -> bool:
        if not reply.answered:
            return reply.question not in self.texts
        return reply.question in self.texts and reply.answer in self.texts


def require_question(application: Application) -> None:
    """Raises OpsError if the environment configures no question to the AI."""
    if application.ai.ask is None:
        raise OpsError(NOT_DESCRIBED, DESCRIBE)


@action
def begin_interview(application: Application) -> Interview:
    """Send the configured steps before a question, e.g. a login. The records that they create are kept.

    Raises:
        Unreachable: the application does not answer.
        OpsError: it refuses, or no question is configured.
    """
    require_question(application)
    described = application.ai
    assert described.ask
    steps = [*described.before, described.ask, *([described.stored] if described.stored else [])]
    client = StepClient(application, steps)
    for step in described.before:
        _send(client, step)
    return Interview(client, described.ask, described.stored)


@action
def ask_application(interview: Interview) -> InterviewReply:
    """Ask one unique question: an answer from a cache would prove nothing. A refusal is a result too."""
    question, started = f"訓練の質問です。{uuid.uuid4()}", time.monotonic()
    client, step = interview.client, interview.ask
    try:
        answer = client.send(step, **{TEXT: question})
    except NotAnswered as error:
        return InterviewReply(question, 0, "", "", str(error)[:SHOWN], time.monotonic() - started)
    seconds = time.monotonic() - started
    try:
        taken = client.judge(step, answer, **{TEXT: question})
    except StepFailed as error:
        said = str(error) if answer.status in step.status else client.masked(reason_in(answer.content))
        return InterviewReply(question, answer.status, "", "", said[:SHOWN], seconds)
    who, model = (str(taken.get(name, "")) for name in ("provider", "model"))
    return InterviewReply(question, answer.status, who, model, "", seconds, str(taken["answer"]))


@probe
def read_stored(interview: Interview) -> StoredReply | None:
    """The stored texts; None if `[application.ai] stored` is not configured.

    Raises:
        Unreachable, OpsError: it cannot be read.
    """
    if interview.stored is None:
        return None
    answer = _send(interview.client, interview.stored)
    try:
        body: Any = json.loads(answer.content)
    except ValueError:
        raise OpsError(f"{interview.stored.title}: the answer is no JSON", HINT) from None
    return StoredReply(frozenset(strings_in(body)))


def _send(client: StepClient, step: HttpStep) -> HttpAnswer:
    try:
        answer = client.send(step)
        client.judge(step, answer)
    except NotAnswered as error:
        raise Unreachable(f"the application: {error}", HINT) from None
    except StepFailed as error:
        raise OpsError(f"the application: {step.title}: {error}", HINT) from None
    return answer
