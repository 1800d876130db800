"""AWS Bedrock by boto3: foundation models with their lifecycle, and Converse.

https://docs.aws.amazon.com/bedrock/latest/APIReference/API_ListFoundationModels.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
)
from botocore.exceptions import ConnectionError as NotConnected
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from pydantic import SecretStr

from blocks.ai_providers import AIProviders
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.ai import shape
from tasks.ai.answer import HINTS, PROMPT, Failed, Kind, ProviderAnswer, answered, without_secrets
from tasks.ai.lifecycle import Lifecycle

# An inference profile is a model with a region's prefix: jp.anthropic.claude-…
_PROFILES = ("us.", "us-gov.", "eu.", "apac.", "jp.", "au.", "ca.", "global.")
_CODES: dict[str, Kind] = {
    "AccessDeniedException": "refused",
    "UnrecognizedClientException": "refused",
    "InvalidSignatureException": "refused",
    "ExpiredTokenException": "refused",
    "ResourceNotFoundException": "missing",
    "ThrottlingException": "throttled",
    "ServiceQuotaExceededException": "throttled",
    "TooManyRequestsException": "throttled",
    "ModelTimeoutException": "hangs",
}


@probe
def ask_bedrock(ai: AIProviders, model: str) -> ProviderAnswer:
    """Send the canary. A listed model without access is refused here."""
    found = answered(ai, "bedrock", model, lambda: _converse(ai, model), shape.BEDROCK)
    if not found.ok:
        return found
    return ProviderAnswer(**{**vars(found), "version": model, "tokens": int(found.body["usage"]["totalTokens"])})


@probe
def read_bedrock_models(ai: AIProviders) -> dict[str, Lifecycle]:
    """The lifecycle of each model: ACTIVE or LEGACY, and its retirement if the service reports it.

    Raises:
        OpsError: the service does not list the models.
    """
    try:
        with _calling(ai, "bedrock", ai.bedrock_endpoint) as client:
            body = client.list_foundation_models()
        return {str(one["modelId"]): _lifecycle(one.get("modelLifecycle") or {}) for one in body["modelSummaries"]}
    except Failed as error:
        said, hint = without_secrets(ai, error.said), HINTS[error.kind]
    except (KeyError, TypeError, AttributeError):
        said, hint = "its answer has other fields", HINTS["garbage"]
    raise OpsError(f"Bedrock does not list its models: {said}", f"{hint}; it needs bedrock:ListFoundationModels")


def model_of(name: str) -> str:
    """The model of an inference profile, or the model itself."""
    prefix = next((one for one in _PROFILES if name.startswith(one)), "")
    return name.removeprefix(prefix)


def _lifecycle(found: dict[str, Any]) -> Lifecycle:
    ends = found.get("endOfLifeTime")
    retires = ends.astimezone(UTC).date() if isinstance(ends, datetime) else None
    return Lifecycle(str(found.get("status", "")), retires)


def _converse(ai: AIProviders, model: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": [{"text": PROMPT}]}]
    with _calling(ai, "bedrock-runtime", ai.bedrock_runtime_endpoint) as client:
        body = client.converse(modelId=model, messages=messages, inferenceConfig={"maxTokens": ai.canary_tokens})
    return {name: value for name, value in body.items() if name != "ResponseMetadata"}


@contextmanager
def _calling(ai: AIProviders, service: str, endpoint: str) -> Iterator[Any]:
    """A client whose errors become `Failed`."""
    try:
        yield _client(
            service, endpoint, ai.bedrock_region, ai.bedrock_access_key, ai.bedrock_secret_key, ai.timeout_seconds
        )
    except ClientError as error:
        raise _meaning(error) from None
    except ReadTimeoutError:
        raise Failed("hangs", f"no answer within {ai.timeout_seconds:g} s") from None
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise Failed("refused", str(error)) from None
    except (ResponseParserError, AttributeError, TypeError):  # botocore assumes that any JSON is an object
        raise Failed("garbage", "its answer cannot be read") from None
    except NotConnected as error:
        raise Failed("unreachable", str(error)) from None
    except (BotoCoreError, ValueError) as error:
        raise Failed("rejected", str(error)) from None


@lru_cache(maxsize=8)
def _client(service: str, endpoint: str, region: str, access_key: str, secret_key: SecretStr, seconds: float) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=access_key or None,
        aws_secret_access_key=secret_key.get_secret_value() or None,
        region_name=region or None,
    )
    retries = {"mode": "standard", "total_max_attempts": 1}
    config = Config(connect_timeout=seconds, read_timeout=seconds, retries=retries)
    return session.client(service, endpoint_url=endpoint or None, config=config)


def _meaning(error: ClientError) -> Failed:
    details = error.response.get("Error", {})
    code, status = str(details.get("Code", "")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = _CODES.get(code) or {401: "refused", 403: "refused", 404: "missing", 429: "throttled"}.get(status)
    if kind is None:
        kind = "broken" if status >= 500 else "rejected"
    if "model identifier is invalid" in str(details.get("Message", "")):
        kind = "missing"
    return Failed(kind, f"{status} {code}: {details.get('Message', '')}".rstrip(": "))  # type: ignore[arg-type]
