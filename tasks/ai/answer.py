"""What a provider made of a request: an answer, or one of the ways in which it has none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from blocks.ai_providers import AIProviders
from runbook.masking import masked, without
from tasks.ai.shape import lacks

PROMPT = "This is a canary of the operators. Answer with the one word OK."
SAID_LETTERS = 300

Kind = Literal[
    "ok", "unreachable", "hangs", "refused", "missing", "throttled", "rejected", "broken", "garbage", "shape"
]
HINTS: dict[Kind, str] = {
    "unreachable": "look at the endpoint's name, at the network, and at the provider's status page",
    "hangs": "look at the provider's status page; [ai_providers] timeout_seconds says how long it was waited for",
    "refused": "renew the key or the token, and look at the rights of whom it belongs to",
    "missing": "there is no such deployment, model or version: correct [ai_providers], or deploy it",
    "throttled": "its quota is used up: wait, or ask for a higher one (check-rate-limits shows who takes it)",
    "rejected": "it does not take this request: read what it says, and the API version's documentation",
    "broken": "look at the provider's status page; the application falls back meanwhile (rehearse-fallback)",
    "garbage": "something else answers there (a proxy, a login page): look at the endpoint",
    "shape": "the application cannot read that: compare with the API version's documentation (update-ai-api-version)",
}


class Failed(Exception):
    """There is no answer. `said`: for people, without secrets once it is in an `Answer`."""

    def __init__(self, kind: Kind, said: str) -> None:
        self.kind: Kind = kind
        self.said = said
        super().__init__(said)


@dataclass(frozen=True)
class Answer:
    """To one canary. `version` is the model that says it answered; `tokens` of prompt and answer together; `said` is
    why there is no (readable) answer."""

    provider: str
    model: str
    kind: Kind
    said: str
    seconds: float
    version: str = ""
    tokens: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the application could read it."""
        return self.kind == "ok"

    @property
    def told(self) -> str:
        """For people."""
        return f"{self.seconds:.2f} s, {self.tokens} tokens" if self.ok else f"{self.said} (after {self.seconds:.2f} s)"


def answered(
    ai: AIProviders, provider: str, model: str, work: Callable[[], dict[str, Any]], shape: Mapping[str, type]
) -> Answer:
    """Ask, and read the answer by its expected shape. Whatever goes wrong is part of the result: it is not tried again,
    since that is what users see too."""
    started = time.monotonic()
    try:
        body = work()
    except Failed as error:
        return Answer(provider, model, error.kind, without_secrets(ai, error.said), time.monotonic() - started)
    seconds = time.monotonic() - started
    if missing := lacks(body, shape):
        return Answer(provider, model, "shape", f"its answer has another shape: {'; '.join(missing)}", seconds)
    return Answer(provider, model, "ok", "", seconds, body=body)


def without_secrets(ai: AIProviders, text: str) -> str:
    """A provider may repeat the key that it refuses."""
    known = (secret.get_secret_value() for secret in (ai.azure_key, ai.bedrock_secret_key))
    return masked(" ".join(without(text, known).split()))[:SAID_LETTERS]
