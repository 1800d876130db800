"""What the backend reads and writes in PostgreSQL. The caller owns the transaction."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from .ai import Completion
from .audit import AuditEvent


@dataclass(frozen=True)
class User:
    """A row of ``users``, as far as logging in needs it."""

    id: int
    password_hash: str
    is_active: bool


@dataclass(frozen=True)
class Session:
    """A row of ``interview_sessions``."""

    id: uuid.UUID
    user_id: int
    position: str
    status: str
    score: Decimal | None
    started_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True)
class Message:
    """A row of ``interview_messages``."""

    message_id: int
    role: str
    content: str
    tokens: int
    created_at: datetime


async def find_user(connection: AsyncConnection, username: str) -> User | None:
    """Return the user of that name, or None."""
    found = await connection.execute(
        text("SELECT id, password_hash, is_active FROM public.users WHERE username = :username"), {"username": username}
    )
    row = found.one_or_none()
    return None if row is None else User(*row)


async def insert_session(connection: AsyncConnection, user_id: int, position: str, request_id: str) -> uuid.UUID:
    """Begin a session and return its id. Raises `sqlalchemy.exc.IntegrityError` when the user is gone."""
    inserted = await connection.execute(
        text(
            "INSERT INTO public.interview_sessions (user_id, position, status, metadata)"
            " VALUES (:user_id, :position, 'in_progress', jsonb_build_object('request_id', CAST(:request_id AS text)))"
            " RETURNING id"
        ),
        {"user_id": user_id, "position": position, "request_id": request_id},
    )
    session_id: uuid.UUID = inserted.scalar_one()
    return session_id


async def find_session(connection: AsyncConnection, session_id: uuid.UUID) -> Session | None:
    """Return the session, or None."""
    found = await connection.execute(
        text(
            "SELECT id, user_id, position, status, score, started_at, ended_at"
            " FROM public.interview_sessions WHERE id = :id"
        ),
        {"id": session_id},
    )
    row = found.one_or_none()
    return None if row is None else Session(*row)


async def insert_exchange(
    connection: AsyncConnection, session_id: uuid.UUID, content: str, reply: Completion
) -> tuple[int, int]:
    """Store a user's message and its reply in one statement; return their ids, in that order."""
    inserted = await connection.execute(
        text(
            "INSERT INTO public.interview_messages (session_id, role, content, tokens, provider, model) VALUES"
            " (:session_id, 'user', :content, :prompt_tokens, NULL, NULL),"
            " (:session_id, 'assistant', :reply, :completion_tokens, :provider, :model) RETURNING id"
        ),
        {
            "session_id": session_id,
            "content": content,
            "prompt_tokens": reply.prompt_tokens,
            "reply": reply.text,
            "completion_tokens": reply.completion_tokens,
            "provider": reply.provider,
            "model": reply.model,
        },
    )
    first, second = inserted.scalars()
    return int(first), int(second)


async def list_messages(connection: AsyncConnection, session_id: uuid.UUID) -> Sequence[Message]:
    """Return the session's messages in the order in which they were stored."""
    found = await connection.execute(
        text(
            "SELECT id, role, content, tokens, created_at FROM public.interview_messages"
            " WHERE session_id = :session_id ORDER BY id"
        ),
        {"session_id": session_id},
    )
    return [Message(*row) for row in found]


async def insert_audit_event(connection: AsyncConnection, event: AuditEvent) -> None:
    """Store what `audit.write` logs. An address that is none (a socket's name) is stored as unknown."""
    await connection.execute(
        text(
            "INSERT INTO public.audit_events (occurred_at, user_id, action, resource, result, ip_address, user_agent)"
            " VALUES (:occurred_at, :user_id, :action, :resource, :result,"
            " CASE WHEN pg_input_is_valid(:ip_address, 'inet') THEN CAST(:ip_address AS inet) END, :user_agent)"
        ),
        {
            "occurred_at": event.occurred_at,
            "user_id": int(event.user_id) if event.user_id else None,
            "action": event.action,
            "resource": event.resource,
            "result": event.result,
            "ip_address": event.ip_address,
            "user_agent": event.user_agent,
        },
    )
