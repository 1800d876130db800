"""JSON over HTTP with a deadline for the whole answer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import httpx

from tasks.ai.answer import Failed, Kind

MOST_BYTES = 4 << 20
_KINDS: dict[int, Kind] = {401: "refused", 403: "refused", 404: "missing", 408: "hangs", 429: "throttled"}


def call(
    method: str,
    url: str,
    headers: Mapping[str, str],
    seconds: float,
    body: Mapping[str, Any] | None = None,
    *,
    proxied: bool = True,
) -> dict[str, Any]:
    """Request a JSON object. `proxied`: through the proxy of the worker's environment, if there is one.

    Raises:
        Failed: there is no JSON object.
    """
    end = time.monotonic() + seconds
    try:
        with (
            httpx.Client(timeout=seconds, trust_env=proxied) as client,
            client.stream(method, url, headers=dict(headers), json=body) as answer,
        ):
            content = b""
            for chunk in answer.iter_bytes():
                content += chunk
                if time.monotonic() > end:  # httpx's own timeout restarts with every chunk
                    raise Failed("hangs", f"its answer was not complete within {seconds:g} s")
                if len(content) > MOST_BYTES:
                    raise Failed("garbage", f"its answer is longer than {MOST_BYTES >> 20} MiB")
            return _read(answer, content)
    except httpx.ConnectTimeout:
        raise Failed("unreachable", f"no connection within {seconds:g} s") from None
    except httpx.TimeoutException:
        raise Failed("hangs", f"no answer within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise Failed("unreachable", f"{type(error).__name__}: {error}") from None


def _read(answer: httpx.Response, content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    status = answer.status_code
    if status != httpx.codes.OK:
        kind = _KINDS.get(status) or ("broken" if status >= 500 else "rejected" if status >= 400 else "garbage")
        raise Failed(kind, f"{status} {answer.reason_phrase}: {_message(body)}".rstrip(": "))
    if not isinstance(body, dict):
        kind_of = answer.headers.get("content-type", "no type")
        raise Failed("garbage", f"its answer is no JSON object: {len(content):,} bytes ({kind_of})")
    return body


def _message(body: Any) -> str:
    """The message of an error in the format of Azure and Google."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, dict):
        return " ".join(str(error[name]) for name in ("code", "status", "message") if error.get(name))
    return str(error) if isinstance(error, str) else ""
