"""What the handlers work with, opened once per process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import Sentinel
from sqlalchemy.ext.asyncio import AsyncEngine

from .ai import AIService
from .database import create_engine
from .settings import Settings

REDIS_TIMEOUT_SECONDS = 2.0
CLOSE_TIMEOUT_SECONDS = 0.5


@dataclass(frozen=True)
class Resources:
    """Pool, Redis client and AI chain; none of them connects before it is used."""

    settings: Settings
    engine: AsyncEngine
    redis: Redis
    ai: AIService
    executor: ThreadPoolExecutor

    @classmethod
    def open(cls, settings: Settings) -> Resources:
        executor = ThreadPoolExecutor(max_workers=32, thread_name_prefix="blocking")
        return cls(
            settings,
            create_engine(settings),
            _redis(settings),
            AIService.at(settings.ai_providers_url, executor, settings.ai_base_urls),
            executor,
        )

    async def close(self) -> None:
        """Close everything within a second, also when a server hangs: the process is about to end anyway."""
        await _bounded(self.engine.dispose())
        await _bounded(self.redis.aclose())
        self.executor.shutdown(wait=False, cancel_futures=True)


def _redis(settings: Settings) -> Redis:
    """A client of the server that the Sentinels name as master whenever it connects; without them, of the URL's."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": REDIS_TIMEOUT_SECONDS,
        "socket_connect_timeout": REDIS_TIMEOUT_SECONDS,
    }
    if not settings.redis_sentinels:
        return Redis.from_url(settings.redis_url, **options)
    told = {**parse_url(settings.redis_url)}
    options |= {key: told[key] for key in ("username", "password", "db") if key in told}
    sentinels = cast(Any, Sentinel)(settings.redis_sentinels, socket_timeout=REDIS_TIMEOUT_SECONDS)
    return cast(Redis, sentinels.master_for(settings.redis_master, **options))


async def _bounded(closing: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(closing)
    await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_SECONDS)
    task.cancel()


def _resources_of(request: Request) -> Resources:
    resources: Resources = request.app.state.resources
    return resources


ResourcesOf = Annotated[Resources, Depends(_resources_of)]
