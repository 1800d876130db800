"""Azure OpenAI, AWS Bedrock and GCP Vertex AI on loopback, as their protocols are: real HTTP, faults on request.

with providers() as server:
    with server.fault("azure", "hang"):
        ...                         # its answers to that provider's canaries do not come
    server.lifecycle["model"] = "LEGACY"
"""

from __future__ import annotations

import contextlib
import json
import re
from datetime import UTC, date, datetime
from typing import Any, Literal

from tests.faulty import FaultyHandler, FaultyServer, serving

KEY, SECRET, TOKEN = "azure-key-4711-geheim", "bedrock-secret-4712-geheim", "ya29.vertex-token-4713-geheim"
MODEL = "anthropic.claude-3-5-sonnet-20240620-v1:0"
Fault = Literal["", "401", "403", "404", "429", "500", "hang", "drip", "garbage", "array", "shape", "many tokens"]
_ERRORS = {
    "azure": {
        "401": "401",
        "403": "Forbidden",
        "404": "DeploymentNotFound",
        "429": "429",
        "500": "InternalServerError",
    },
    "bedrock": {
        **{"401": "UnrecognizedClientException", "403": "AccessDeniedException", "404": "ResourceNotFoundException"},
        **{"429": "ThrottlingException", "500": "InternalServerException"},
    },
    "vertex": {
        **{"401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "NOT_FOUND", "429": "RESOURCE_EXHAUSTED"},
        **{"500": "INTERNAL"},
    },
}


class ProviderServer(FaultyServer[Fault]):
    """The three of them. `asked`: (method, path) of every request; `lifecycle`, `ends`: of Bedrock's models;
    `deprecated`: of Azure's; `shapes`: API version → fields of Azure's answer that are other there."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.faults.clear()
        self.asked: list[tuple[str, str]] = []
        self.lifecycle = {MODEL: "ACTIVE"}
        self.ends: dict[str, date] = {}
        self.deprecated: dict[str, date] = {}
        self.shapes: dict[str, dict[str, Any]] = {}
        self.refused_versions: set[str] = set()
        self.reasoning = False


class _Handler(FaultyHandler):
    server: ProviderServer

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.server.asked.append((self.command, self.path))
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"{}")
        provider = (
            "azure" if self.path.startswith("/openai") else "vertex" if self.path.startswith("/v1/") else "bedrock"
        )
        if not self._knows(provider):
            self._error(provider, "401", f"the key {self._told()} is not known")
        elif self.command == "GET":
            self._answer(self._list(provider))
        else:
            self._complete(provider, body)

    def _told(self) -> str:
        return self.headers.get("api-key") or self.headers.get("Authorization", "")

    def _knows(self, provider: str) -> bool:
        if provider == "bedrock":  # its signature is not computed here; that there is one is looked at
            return self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 Credential=ops/")
        return self._told() == {"azure": KEY, "vertex": f"Bearer {TOKEN}"}[provider]

    def _complete(self, provider: str, body: dict[str, Any]) -> None:
        fault = self.server.faults.get(provider, "")
        match fault:
            case "401" | "403" | "404" | "429" | "500":
                self._error(provider, fault, f"fault {fault} of {self._told().removeprefix('Bearer ')}")
            case "hang":
                self.hang()
            case "drip":
                self.drip(b"HTTP/1.1 200 OK\r\n\r\n", b" ")
            case "garbage":
                self._send(200, b"<html>Please log in</html>", "text/html")
            case "array":
                self._send(200, b"[]", "application/json")
            case _:
                self._good(provider, body, fault)

    def _good(self, provider: str, body: dict[str, Any], fault: str) -> None:
        version = (re.findall(r"api-version=([^&]*)", self.path) or ["v1"])[0]
        if provider == "azure" and version in self.server.refused_versions:
            self._error(provider, "404", "Resource not found")
        elif provider == "azure" and self.server.reasoning and "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            self._answer({"error": {"code": "unsupported_parameter", "message": message}}, 400)
        else:
            total = 5000 if fault == "many tokens" else 24
            answer = {"azure": _azure, "bedrock": _bedrock, "vertex": _vertex}[provider](total)
            if fault == "shape":
                answer = {"result": "OK"}
            elif provider == "azure":
                answer |= self.server.shapes.get(version, {})
            self._answer(answer)

    def _list(self, provider: str) -> dict[str, Any]:
        if provider == "azure":
            ends = self.server.deprecated
            models = [{"id": "gpt-4o-2024-08-06", "lifecycle_status": "generally-available"}]
            for model in models:
                if model["id"] in ends:
                    day = ends[model["id"]]
                    model["deprecation"] = {
                        "inference": int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
                    }  # type: ignore[assignment]
            return {"data": models}
        if provider == "vertex":
            return {
                "endpoints": [
                    {
                        "name": "projects/1/locations/l/endpoints/2",
                        "displayName": "scoring",
                        "deployedModels": [{"model": "projects/1/models/3"}],
                    }
                ]
            }
        return {"modelSummaries": [self._summary(model, status) for model, status in self.server.lifecycle.items()]}

    def _summary(self, model: str, status: str) -> dict[str, Any]:
        ends = {"endOfLifeTime": f"{self.server.ends[model]}T00:00:00Z"} if model in self.server.ends else {}
        arn = f"arn:aws:bedrock:ap-northeast-1::foundation-model/{model}"
        return {"modelArn": arn, "modelId": model, "modelLifecycle": {"status": status, **ends}}

    def _error(self, provider: str, status: str, message: str) -> None:
        code = _ERRORS[provider][status]
        if provider == "bedrock":
            self._send(int(status), json.dumps({"message": message}).encode(), "application/json", code)
        else:
            name = "code" if provider == "azure" else "status"
            self._answer({"error": {name: code, "message": message}}, int(status))

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str, error: str = "") -> None:
        self.send(status, content, Content_Type=kind, **({"x_amzn_ErrorType": error} if error else {}))


def _azure(total: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": "OK"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": total - 20, "total_tokens": total},
    }


def _bedrock(total: int) -> dict[str, Any]:
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": "OK"}]}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": 20, "outputTokens": total - 20, "totalTokens": total},
        "metrics": {"latencyMs": 12},
    }


def _vertex(total: int) -> dict[str, Any]:
    return {
        "candidates": [{"content": {"role": "model", "parts": [{"text": "OK"}]}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": total - 20, "totalTokenCount": total},
        "modelVersion": "gemini-2.5-pro",
    }


def providers() -> contextlib.AbstractContextManager[ProviderServer]:
    """A server on a free port while the block runs."""
    return serving(ProviderServer())
