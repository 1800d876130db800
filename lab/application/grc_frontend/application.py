"""``GET /`` the page, ``GET /health`` whether the backend answers."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

BACKEND_TIMEOUT_SECONDS = 3.0  # the backend's own health check is bounded to 2 s

_PAGE = """<!DOCTYPE html>
<html lang="ja">
<head><meta charset="utf-8"><title>AI面接システム</title></head>
<body>
<h1>AI面接システム</h1>
<p>面接を始めるにはログインしてください。</p>
<p>状態: <output id="status">確認中</output></p>
<script>
fetch("/health").then(answer => answer.json()).then(health => {
  document.getElementById("status").textContent = health.backend === "ok" ? "稼働中" : "停止中";
});
</script>
</body>
</html>
"""


def create_application(backend_url: str) -> Starlette:
    """Return the ASGI application that asks the backend at `backend_url`. Raises `ValueError` if it is no URL."""
    if not backend_url.startswith(("http://", "https://")):
        raise ValueError("BACKEND_URL is no http address")

    async def page(request: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE)

    async def health(request: Request) -> JSONResponse:
        backend = await asyncio.to_thread(_ask, f"{backend_url.rstrip('/')}/health")
        reached = backend != "unreachable"
        body = {"status": "healthy" if reached else "unhealthy", "backend": backend}
        return JSONResponse(body, status_code=200 if reached else 503)

    return Starlette(routes=[Route("/", page), Route("/health", health)])


def _ask(url: str) -> str:
    """Return ``ok``, ``unhealthy`` (it answers, but not 200) or ``unreachable``."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=BACKEND_TIMEOUT_SECONDS):
            return "ok"
    except urllib.error.HTTPError:
        return "unhealthy"
    except OSError:
        return "unreachable"
