"""GCP Vertex AI: Gemini models by generateContent, and the location's endpoints, with an access token.

https://cloud.google.com/vertex-ai/docs/reference/rest
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any
from urllib.parse import quote

from pydantic import SecretStr

from blocks.ai_providers import AIProviders
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe
from runbook.masking import masked, without
from tasks.ai import shape
from tasks.ai.answer import HINTS, PROMPT, SAID_LETTERS, Failed, ProviderAnswer, answered, without_secrets
from tasks.ai.http import call

GCLOUD = ("gcloud", "auth", "print-access-token")
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
ADC_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
LOG_IN = (
    f"give the worker Application Default Credentials: a file in {ADC_FILE}, its host's service account, or gcloud "
    "auth application-default login"
)
MOST_ENDPOINTS = 100


@probe
def find_vertex_token(ai: AIProviders) -> SecretStr:
    """An access token: from the configured variable, else from Google's credential chain, else from gcloud. It is valid
    for one hour, so no block stores it.

    Raises:
        OpsError: there is none.
    """
    if ai.vertex_token_variable:
        found, source = os.environ.get(ai.vertex_token_variable, "").strip(), f"the variable {ai.vertex_token_variable}"
    else:
        found, source = _default_token(ai)
    if not re.fullmatch(r"[\x21-\x7e]{8,}", found):
        what = "nothing" if not found else "no valid token"
        raise OpsError(f"there is no access token for Vertex AI: {source} returns {what}", LOG_IN)
    return SecretStr(found)


def _default_token(ai: AIProviders) -> tuple[str, str]:
    """A token and its source, by Application Default Credentials: the file of GOOGLE_APPLICATION_CREDENTIALS, gcloud's
    file, the metadata server. Without them, the token of the user that is logged in to gcloud.

    https://cloud.google.com/docs/authentication/application-default-credentials
    """
    import google.auth  # 0.3 s to import
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
        credentials.refresh(partial(Request(), timeout=ai.timeout_seconds))  # type: ignore[no-untyped-call]
    except DefaultCredentialsError as error:
        if ADC_FILE in os.environ:
            raise OpsError(f"there is no access token for Vertex AI: {_first(error)}", LOG_IN) from None
        return _gcloud_token(ai), "gcloud"
    except (GoogleAuthError, ValueError) as error:
        raise OpsError(f"Google refuses the credentials for Vertex AI: {_first(error)}", LOG_IN) from None
    return str(credentials.token or ""), "Google's credential chain"


def _first(error: Exception) -> str:
    """The message, without the complete answer that follows it."""
    return masked(" ".join(str(error.args[0] if error.args else error).split()))[:SAID_LETTERS]


def _gcloud_token(ai: AIProviders) -> str:
    try:
        return shell.run(
            GCLOUD, inherit=(*shell.NETWORK, "CLOUDSDK_*", "GOOGLE_*"), timeout_seconds=ai.timeout_seconds
        ).stdout.strip()
    except OpsError as error:
        raise OpsError(
            f"there is no access token for Vertex AI: no default credentials, and {error.message}", LOG_IN
        ) from None


@probe
def ask_vertex(ai: AIProviders, model: str, token: SecretStr) -> ProviderAnswer:
    """Send the canary."""
    found = answered(ai, "vertex", model, lambda: _generate(ai, model, token), shape.VERTEX)
    if not found.ok:
        return found
    body = found.body
    details = {
        "version": str(body.get("modelVersion") or model),
        "tokens": int(body["usageMetadata"]["totalTokenCount"]),
    }
    return ProviderAnswer(**{**vars(found), **details})


@probe
def read_vertex_endpoints(ai: AIProviders, token: SecretStr) -> list[str]:
    """The names of the location's own endpoints with their models; this also checks project and location.

    Raises:
        OpsError: they cannot be listed.
    """
    try:
        body = _call(ai, token, "GET", f"endpoints?pageSize={MOST_ENDPOINTS}")
        return [_described(found) for found in body.get("endpoints", [])]
    except Failed as error:
        said, hint = without_secrets(ai, error.said), HINTS[error.kind]
    except (TypeError, AttributeError, KeyError):
        said, hint = "its list of endpoints has other fields", HINTS["garbage"]
    where = f"{ai.vertex_project} in {ai.vertex_location}"
    raise OpsError(f"Vertex AI does not list the endpoints of {where}: {said}", f"{hint}; it needs aiplatform.viewer")


def _described(found: dict[str, Any]) -> str:
    models = [str(one.get("model", one.get("displayName", ""))) for one in found.get("deployedModels", [])]
    name = str(found.get("displayName") or found["name"])
    return f"{name}: {', '.join(models) or 'no deployed model'}"


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
        raise Failed(error.kind, without(error.said, [secret])) from None
