"""``POST /{provider}`` ``{"prompt"}``, ``POST /control/{provider}`` ``{"failing"}``, ``GET /health``."""

from __future__ import annotations

import hashlib
import json

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

PROVIDERS = ("azure", "bedrock", "vertex")
_OPENINGS = (
    "ご回答ありがとうございます。",
    "なるほど、よく分かりました。",
    "とても興味深いご経験ですね。",
    "具体的にお話しいただき助かります。",
)
_QUESTIONS = (
    "その時に最も難しかった点と、どのように乗り越えたかを教えてください。",
    "チームの中でご自身が果たした役割を詳しく聞かせてください。",
    "同じ状況にもう一度置かれたら、何を変えますか。",
    "その成果をどのような数字で確かめましたか。",
    "障害が起きた場合、最初の十分間に何をしますか。",
    "入社後の一年間で実現したいことは何でしょうか。",
)


class FakeProviders:
    """The providers' state: which of them fail at present. It is gone when the process ends."""

    def __init__(self) -> None:
        self._failing: set[str] = set()

    async def complete(self, request: Request) -> JSONResponse:
        provider = request.path_params["provider"]
        if provider not in PROVIDERS:
            return JSONResponse({"error": "no such provider"}, status_code=404)
        if provider in self._failing:
            return JSONResponse({"error": f"{provider} is out of service"}, status_code=503)
        try:
            prompt = str((await request.json())["prompt"])
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": 'the body is not {"prompt": …}'}, status_code=400)
        text = reply_to(provider, prompt)
        prompt_tokens, completion_tokens = _count_tokens(prompt), _count_tokens(text)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        return JSONResponse({"text": text, "usage": usage})

    async def control(self, request: Request) -> JSONResponse:
        provider = request.path_params["provider"]
        try:
            failing = (await request.json())["failing"]
        except (ValueError, KeyError, TypeError):
            failing = None
        if provider not in PROVIDERS or not isinstance(failing, bool):
            return JSONResponse({"error": 'POST /control/{provider} {"failing": true}'}, status_code=400)
        (self._failing.add if failing else self._failing.discard)(provider)
        return JSONResponse({"provider": provider, "failing": failing})

    async def health(self, request: Request) -> JSONResponse:
        providers = {name: "failing" if name in self._failing else "ok" for name in PROVIDERS}
        return JSONResponse({"status": "healthy", "providers": providers})


def reply_to(provider: str, prompt: str) -> str:
    """Return the Japanese reply that `provider` always gives to `prompt`."""
    digest = hashlib.sha256(json.dumps([provider, prompt]).encode()).digest()
    return _OPENINGS[digest[0] % len(_OPENINGS)] + _QUESTIONS[digest[1] % len(_QUESTIONS)]


def _count_tokens(text: str) -> int:
    # About what tokenizers make of Japanese: more than one character per token, never 0.
    return max(1, len(text) * 2 // 3)


def create_application() -> Starlette:
    """Return the ASGI application."""
    fakes = FakeProviders()
    return Starlette(
        routes=[
            Route("/health", fakes.health),
            Route("/control/{provider}", fakes.control, methods=["POST"]),
            Route("/{provider}", fakes.complete, methods=["POST"]),
        ]
    )
