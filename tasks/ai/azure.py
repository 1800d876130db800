"""Azure OpenAI: chat completions of a deployment, and the models of the resource.

https://learn.microsoft.com/azure/ai-services/openai/reference
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from blocks.ai_providers import AIProviders
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.ai import shape
from tasks.ai.answer import PROMPT, Failed, ProviderAnswer, answered, without_secrets
from tasks.ai.http import call
from tasks.ai.lifecycle import Lifecycle

V1 = "v1"  # the API without dates: the deployment is in the body


@probe
def ask_azure(ai: AIProviders, deployment: str, version: str) -> ProviderAnswer:
    """Send the canary on one API version."""
    found = answered(ai, "azure", deployment, lambda: _complete(ai, deployment, version), shape.AZURE)
    if not found.ok:
        return found
    usage = found.body["usage"]
    details = {"version": str(found.body["model"]), "tokens": int(usage["total_tokens"])}
    return ProviderAnswer(**{**vars(found), **details})


@probe
def read_azure_models(ai: AIProviders, version: str) -> dict[str, Lifecycle]:
    """The lifecycle of each model, by the service itself (`deprecation.inference`).

    Raises:
        OpsError: the service does not list it.
    """
    base = ai.azure_endpoint.rstrip("/")
    url = f"{base}/openai/v1/models" if version == V1 else f"{base}/openai/models?api-version={quote(version)}"
    try:
        body = call("GET", url, _headers(ai), ai.timeout_seconds)
        return {str(model["id"]): _lifecycle(model) for model in body["data"]}
    except Failed as error:
        said = without_secrets(ai, error.said)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        said = "its list of models has other fields"
    raise OpsError(f"Azure does not list its models: {said}", "look up the dates in the provider's documentation")


def _lifecycle(model: dict[str, Any]) -> Lifecycle:
    ends = (model.get("deprecation") or {}).get("inference")
    retires = datetime.fromtimestamp(int(ends), UTC).date() if ends else None
    return Lifecycle(str(model.get("lifecycle_status", "")), retires)


def _complete(ai: AIProviders, deployment: str, version: str) -> dict[str, Any]:
    base, body = ai.azure_endpoint.rstrip("/"), {"messages": [{"role": "user", "content": PROMPT}]}
    if version == V1:
        url, body = f"{base}/openai/v1/chat/completions", {**body, "model": deployment}  # type: ignore[dict-item]
    else:
        path = f"deployments/{quote(deployment, safe='')}/chat/completions"
        url = f"{base}/openai/{path}?api-version={quote(version)}"
    try:
        return call("POST", url, _headers(ai), ai.timeout_seconds, {**body, "max_tokens": ai.canary_tokens})
    except Failed as error:
        if error.kind != "rejected" or "max_completion_tokens" not in error.said:
            raise
    # Reasoning models reject max_tokens; older versions accept nothing else.
    return call("POST", url, _headers(ai), ai.timeout_seconds, {**body, "max_completion_tokens": ai.canary_tokens})


def _headers(ai: AIProviders) -> dict[str, str]:
    key = ai.azure_key.get_secret_value()
    if not key.isascii() or not key.isprintable():
        raise Failed("refused", "the key is invalid: a header cannot contain its characters")
    return {"api-key": key}
