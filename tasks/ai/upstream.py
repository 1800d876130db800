"""The providers' addresses, and AWS signatures for requests to them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import boto3  # type: ignore[import-untyped]
from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

from blocks.ai_providers import AIProviders, Provider
from runbook.errors import OpsError

_SIGNED = re.compile("authorization|x-amz-(date|security-token|content-sha256)", re.IGNORECASE)


def upstream_of(ai: AIProviders, name: Provider) -> str:
    """The provider's address, without a trailing slash.

    Raises:
        OpsError: none is configured.
    """
    match name:
        case "azure":
            found = ai.azure_endpoint
        case "bedrock":
            region = ai.bedrock_region
            found = ai.bedrock_runtime_endpoint or (region and f"https://bedrock-runtime.{region}.amazonaws.com")
        case "vertex":
            place = ai.vertex_location
            host = "aiplatform.googleapis.com" if place == "global" else f"{place}-aiplatform.googleapis.com"
            found = ai.vertex_endpoint or f"https://{host}"
    if not found:
        raise OpsError(f"the address of {name} is not configured", f"set {name}'s endpoint or region in [ai_providers]")
    return found.rstrip("/")


def signed(ai: AIProviders, method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """Headers with an AWS signature (version 4) for `url`, by the credentials of [ai_providers], or AWS's own chain.

    Without credentials the headers are unchanged: AWS refuses the request.
    """
    session = boto3.session.Session(
        aws_access_key_id=ai.bedrock_access_key or None,
        aws_secret_access_key=ai.bedrock_secret_key.get_secret_value() or None,
        region_name=ai.bedrock_region or None,
    )
    plain = {name: value for name, value in headers.items() if not _SIGNED.fullmatch(name)}
    try:
        credentials = session.get_credentials()
    except BotoCoreError:  # an unreadable profile, file or endpoint of credentials
        credentials = None
    if not credentials:
        return dict(headers)
    kept = {name: value for name, value in plain.items() if name.lower() in ("content-type", "accept")}
    request = AWSRequest(method=method, url=url, data=body, headers=kept)
    SigV4Auth(credentials, "bedrock", session.region_name or "us-east-1").add_auth(request)
    return plain | dict(request.headers.items())
