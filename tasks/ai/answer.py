"""The result of a request to a provider: an answer, or the kind of its failure."""

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
    "unreachable": "check the endpoint's name, the network, and the provider's status page",
    "hangs": "check the provider's status page; the timeout is [ai_providers] timeout_seconds",
    "refused": "renew the key or the token, and check the rights of its owner",
    "missing": "correct [ai_providers], or deploy it: no such deployment, model or version exists",
    "throttled": "wait, or request a higher quota: it is used up (check-rate-limits shows the users)",
    "rejected": "read its error message and the API version's documentation",
    "broken": "check the provider's status page; until then the application falls back (rehearse-fallback)",
    "garbage": "check the endpoint: another program answers there (a proxy, a login page)",
    "shape": "compare with the API version's documentation (update-ai-api-version): the application cannot read it",
}


class Failed(Exception):
    """A request without an answer. `said`: the reason; an `Answer` masks its secrets."""

    def __init__(self, kind: Kind, said: str) -> None:
        self.kind: Kind = kind
        self.said = said
        super().__init__(said)


@dataclass(frozen=True)
class ProviderAnswer:
    """The answer to one canary. `version`: the model that answered, by its own statement; `tokens`: of prompt and
    answer together; `said`: the reason for no (readable) answer."""

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
    def text(self) -> str:
        """Latency and tokens, or the reason for no answer."""
        return f"{self.seconds:.2f} s, {self.tokens} tokens" if self.ok else f"{self.said} (after {self.seconds:.2f} s)"


def answered(
    ai: AIProviders, provider: str, model: str, work: Callable[[], dict[str, Any]], shape: Mapping[str, type]
) -> ProviderAnswer:
    """Send a request, and check the fields of its answer. An error is part of the result and is not retried: users see
    it too."""
    started = time.monotonic()
    try:
        body = work()
    except Failed as error:
        return ProviderAnswer(provider, model, error.kind, without_secrets(ai, error.said), time.monotonic() - started)
    seconds = time.monotonic() - started
    if missing := lacks(body, shape):
        return ProviderAnswer(provider, model, "shape", f"its answer has other fields: {'; '.join(missing)}", seconds)
    return ProviderAnswer(provider, model, "ok", "", seconds, body=body)


def without_secrets(ai: AIProviders, text: str) -> str:
    """Mask secrets: a provider can quote the key that it refuses."""
    known = (secret.get_secret_value() for secret in (ai.azure_key, ai.bedrock_secret_key))
    return masked(" ".join(without(text, known).split()))[:SAID_LETTERS]
