"""GCP Vertex AI: Gemini models by generateContent, and the location's endpoints, with an access token.

https://cloud.google.com/vertex-ai/docs/reference/rest
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import quote

from pydantic import SecretStr

from blocks.ai_providers import AIProviders
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.ai import shape
from tasks.ai.answer import HINTS, PROMPT, Answer, Failed, answered, without_secrets
from tasks.ai.http import call

GCLOUD = ("gcloud", "auth", "print-access-token")
LOG_IN = (
    "put an access token into the worker's variable that [ai_providers] vertex_token_variable names; or install the"
    " Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and log in: gcloud auth login"
)
MOST_ENDPOINTS = 100


@probe
def find_vertex_token(ai: AIProviders) -> SecretStr:
    """From the worker's environment, or by gcloud: it lives for an hour, so it is in no block.

    Raises:
        OpsError: there is none.
    """
    if ai.vertex_token_variable:
        found = os.environ.get(ai.vertex_token_variable, "").strip()
        told = f"the variable {ai.vertex_token_variable}"
    else:
        try:
            found = shell.run(GCLOUD, timeout_seconds=ai.timeout_seconds).stdout.strip()
        except OpsError as error:
            raise OpsError(f"there is no access token for Vertex AI: {error.message}", LOG_IN) from None
        told = "gcloud"
    if not re.fullmatch(r"[\x21-\x7e]{8,}", found):
        what = "nothing" if not found else "something else than a token"
        raise OpsError(f"there is no access token for Vertex AI: {told} gives {what}", LOG_IN)
    return SecretStr(found)


@probe
def ask_vertex(ai: AIProviders, model: str, token: SecretStr) -> Answer:
    """The canary."""
    found = answered(ai, "vertex", model, lambda: _generate(ai, model, token), shape.VERTEX)
    if not found.ok:
        return found
    body = found.body
    told = {"version": str(body.get("modelVersion") or model), "tokens": int(body["usageMetadata"]["totalTokenCount"])}
    return Answer(**{**vars(found), **told})


@probe
def read_vertex_endpoints(ai: AIProviders, token: SecretStr) -> list[str]:
    """The names of the location's own endpoints (with the models deployed there): that project and location are there.

    Raises:
        OpsError: they cannot be listed.
    """
    try:
        body = _call(ai, token, "GET", f"endpoints?pageSize={MOST_ENDPOINTS}")
        return [_told(found) for found in body.get("endpoints", [])]
    except Failed as error:
        said, hint = without_secrets(ai, error.said), HINTS[error.kind]
    except (TypeError, AttributeError, KeyError):
        said, hint = "its list of endpoints has another shape", HINTS["garbage"]
    where = f"{ai.vertex_project} in {ai.vertex_location}"
    raise OpsError(f"Vertex AI does not list the endpoints of {where}: {said}", f"{hint}; it takes aiplatform.viewer")


def _told(found: dict[str, Any]) -> str:
    models = [str(one.get("model", one.get("displayName", ""))) for one in found.get("deployedModels", [])]
    name = str(found.get("displayName") or found["name"])
    return f"{name}: {', '.join(models) or 'no model is deployed there'}"


def _generate(ai: AIProviders, model: str, token: SecretStr) -> dict[str, Any]:
    body = {
        "contents": [{"role": "user", "parts": [{"text": PROMPT}]}],
        "generationConfig": {"maxOutputTokens": ai.canary_tokens},
    }
    return _call(ai, token, "POST", f"publishers/google/models/{quote(model, safe='@')}:generateContent", body)


def _call(
    ai: AIProviders, token: SecretStr, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    place, secret = ai.vertex_location, token.get_secret_value()
    host = "aiplatform.googleapis.com" if place == "global" else f"{place}-aiplatform.googleapis.com"
    base = ai.vertex_endpoint.rstrip("/") or f"https://{host}"
    url = f"{base}/v1/projects/{quote(ai.vertex_project, safe='')}/locations/{quote(place, safe='')}/{path}"
    try:
        return call(method, url, {"Authorization": f"Bearer {secret}"}, ai.timeout_seconds, body)
    except Failed as error:
        raise Failed(error.kind, error.said.replace(secret, "********")) from None
