"""``GET /health``: which of the backend's own resources answers; each check takes 2 s at most, and tells no secret."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response
from sqlalchemy import text

from .resources import Resources, ResourcesOf

CHECK_TIMEOUT_SECONDS = 2.0

router = APIRouter()
logger = logging.getLogger(__name__)


@router.get("/health")
async def read_health(resources: ResourcesOf, response: Response) -> dict[str, str]:
    database, redis = await asyncio.gather(
        _check("database", lambda: _ask_database(resources)), _check("redis", lambda: _ask_redis(resources))
    )
    healthy = database == redis == "ok"
    response.status_code = 200 if healthy else 503
    return {"status": "healthy" if healthy else "unhealthy", "database": database, "redis": redis}


async def _check(name: str, ask: Callable[[], Awaitable[None]]) -> str:
    """Return ``ok``, ``timeout`` or ``unreachable``."""
    task = asyncio.ensure_future(ask())
    # Not `wait_for`: it waits for the cancelled task too, and a driver asks the hanging server to cancel first.
    await asyncio.wait({task}, timeout=CHECK_TIMEOUT_SECONDS)
    if not task.done():
        task.cancel()
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return "timeout"
    if (error := task.exception()) is not None:
        logger.warning("Health check failed", extra={"check": name, "error": str(error)})
        return "unreachable"
    return "ok"


async def _ask_database(resources: Resources) -> None:
    async with resources.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def _ask_redis(resources: Resources) -> None:
    await resources.redis.ping()
