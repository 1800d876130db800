"""What the backend keeps in Redis: ``session:``, ``rate_limit:ai:`` and ``cache:ai:``; every key has a TTL."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict
from datetime import UTC, datetime

from redis.asyncio import Redis

from .ai import Completion

SESSION_TTL_SECONDS = 3600
RATE_LIMIT_WINDOW_SECONDS = 3600
REPLY_TTL_SECONDS = 600


async def start_session(redis: Redis, user_id: int, username: str) -> str:
    """Store a log-in session and return its token."""
    token = secrets.token_urlsafe(32)
    session = {"user_id": user_id, "username": username, "created_at": datetime.now(UTC).isoformat()}
    await redis.set(f"session:{token}", json.dumps(session, ensure_ascii=False), ex=SESSION_TTL_SECONDS)
    return token


async def find_session_user(redis: Redis, token: str) -> int | None:
    """Return the user whom `token` belongs to, or None when it is unknown or has expired."""
    stored = await redis.get(f"session:{token}")
    return None if stored is None else int(json.loads(stored)["user_id"])


async def end_session(redis: Redis, token: str) -> None:
    """Forget `token`."""
    await redis.delete(f"session:{token}")


async def count_ai_request(redis: Redis, user_id: int) -> int:
    """Count a request in the user's window and return how many there are.

    In one MULTI, and the expiry only where there is none: the manual's GET, then INCR lets parallel requests pass the
    limit, and its EXPIRE at every request moves the window on for ever (§5.3).
    """
    key = f"rate_limit:ai:{user_id}"
    async with redis.pipeline(transaction=True) as pipeline:
        pipeline.incr(key)
        pipeline.expire(key, RATE_LIMIT_WINDOW_SECONDS, nx=True)
        count, _ = await pipeline.execute()
    return int(count)


async def find_reply(redis: Redis, prompt: str) -> Completion | None:
    """Return the cached reply to `prompt`, or None."""
    stored = await redis.get(_reply_key(prompt))
    return None if stored is None else Completion(**json.loads(stored))


async def keep_reply(redis: Redis, prompt: str, reply: Completion) -> None:
    """Cache the reply to `prompt`."""
    await redis.set(_reply_key(prompt), json.dumps(asdict(reply), ensure_ascii=False), ex=REPLY_TTL_SECONDS)


def _reply_key(prompt: str) -> str:
    return f"cache:ai:{hashlib.sha256(prompt.encode()).hexdigest()}"
