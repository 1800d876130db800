"""One log line per request, written before the answer leaves: what the client was told is in ``app.log``."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger("grc_backend.access")
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestContext:
    """What the handlers find out about a request for its log line; an empty string says: none."""

    request_id: str
    user_id: str = ""
    resource: str = ""


def context_of(request: Request) -> RequestContext:
    """Return the context that `AccessLog` attached to `request`."""
    context: RequestContext = request.scope["grc_context"]
    return context


class AccessLog:
    """ASGI middleware around the whole application, so that the answers to unexpected errors pass through it too."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        context = RequestContext(given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["grc_context"] = context

        async def log_then_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = context.request_id
                _log(scope, context, message["status"], (time.perf_counter() - started) * 1000)
            await send(message)

        await self._application(scope, receive, log_then_send)


def _log(scope: Scope, context: RequestContext, status: int, duration_ms: float) -> None:
    _logger.info(
        "request",
        extra={
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(duration_ms, 3),
            "user_id": context.user_id,
            "request_id": context.request_id,
            "resource": context.resource,
        },
    )
