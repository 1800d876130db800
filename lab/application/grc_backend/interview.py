"""Interview sessions and their messages."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, StringConstraints
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from . import audit, cache, store
from .access import context_of
from .ai import Completion
from .authentication import Caller, CallerOf, Text
from .resources import Resources, ResourcesOf

router = APIRouter(prefix="/api/interview/sessions")


class NewSession(BaseModel):
    position: Text


class SessionCreated(BaseModel):
    session_id: uuid.UUID


class NewMessage(BaseModel):
    content: Annotated[str, StringConstraints(min_length=1, max_length=8000, pattern=r"^[^\x00]*$")]


class Reply(BaseModel):
    message_id: int
    content: str
    provider: str
    model: str


class MessageStored(BaseModel):
    message_id: int
    reply: Reply


class StoredMessage(BaseModel):
    message_id: int
    role: str
    content: str
    tokens: int
    created_at: datetime


class SessionRead(BaseModel):
    session_id: uuid.UUID
    user_id: str
    position: str
    status: str
    score: Decimal | None
    started_at: datetime
    ended_at: datetime | None
    messages: list[StoredMessage]


@router.post("", status_code=201)
async def create_session(
    body: NewSession, request: Request, caller: CallerOf, resources: ResourcesOf
) -> SessionCreated:
    """Begin an interview; the session and its audit event are one transaction."""
    context = context_of(request)
    try:
        async with resources.engine.begin() as connection:
            session_id = await store.insert_session(connection, caller.user_id, body.position, context.request_id)
            event = audit.describe(request, str(caller.user_id), "create_session", str(session_id), "success")
            await store.insert_audit_event(connection, event)
    except IntegrityError:
        # Redis may be newer than a restored database: its session names a user who does not exist (any more).
        await cache.end_session(resources.redis, caller.token)
        raise HTTPException(401, "not logged in", {"WWW-Authenticate": "Bearer"}) from None
    context.resource = str(session_id)
    audit.write(event)
    return SessionCreated(session_id=session_id)


@router.post("/{session_id}/messages", status_code=201)
async def create_message(
    session_id: uuid.UUID, body: NewMessage, request: Request, caller: CallerOf, resources: ResourcesOf
) -> MessageStored:
    """Store the message and the AI's reply together, or neither. 429 above the hourly limit, 503 without any AI.

    The reply is asked for before the transaction begins: a slow provider holds no database connection.
    """
    async with resources.engine.connect() as connection:
        session = await _own_session(connection, session_id, caller)
    reply = await _reply(f"{session.position}の面接\n{body.content}", request, caller, resources)
    async with resources.engine.begin() as connection:
        message_id, reply_id = await store.insert_exchange(connection, session_id, body.content, reply)
    context_of(request).resource = str(message_id)
    return MessageStored(
        message_id=message_id,
        reply=Reply(message_id=reply_id, content=reply.text, provider=reply.provider, model=reply.model),
    )


@router.get("/{session_id}")
async def read_session(
    session_id: uuid.UUID, request: Request, caller: CallerOf, resources: ResourcesOf
) -> SessionRead:
    """Answer the session with its messages in order."""
    async with resources.engine.connect() as connection:
        session = await _own_session(connection, session_id, caller)
        messages = await store.list_messages(connection, session_id)
    context_of(request).resource = str(session_id)
    return SessionRead(
        session_id=session.id,
        user_id=str(session.user_id),
        position=session.position,
        status=session.status,
        score=session.score,
        started_at=session.started_at,
        ended_at=session.ended_at,
        messages=[
            StoredMessage(
                message_id=message.message_id,
                role=message.role,
                content=message.content,
                tokens=message.tokens,
                created_at=message.created_at,
            )
            for message in messages
        ],
    )


async def _own_session(connection: AsyncConnection, session_id: uuid.UUID, caller: Caller) -> store.Session:
    session = await store.find_session(connection, session_id)
    if session is None:
        raise HTTPException(404, "no such session")
    if session.user_id != caller.user_id:
        raise HTTPException(403, "another user's session")
    return session


async def _reply(prompt: str, request: Request, caller: Caller, resources: Resources) -> Completion:
    if await cache.count_ai_request(resources.redis, caller.user_id) > resources.settings.ai_rate_limit:
        raise HTTPException(429, "Rate limit exceeded")
    cached = await cache.find_reply(resources.redis, prompt)
    if cached is not None:
        return cached
    context = context_of(request)
    reply = await resources.ai.generate_response(prompt, user_id=str(caller.user_id), request_id=context.request_id)
    await cache.keep_reply(resources.redis, prompt, reply)
    return reply
