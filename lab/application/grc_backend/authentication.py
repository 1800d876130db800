"""Logging in, and who sends a request."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, StringConstraints

from . import audit, cache, store
from .access import context_of
from .passwords import hash_password, verify_password
from .resources import ResourcesOf

router = APIRouter(prefix="/api/auth")

# PostgreSQL's text holds no NUL.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class Credentials(BaseModel):
    username: Text
    password: Text


class Login(BaseModel):
    token: str
    user_id: str


@dataclass(frozen=True)
class Caller:
    """The logged-in user of a request."""

    user_id: int
    token: str


@router.post("/login")
async def log_in(credentials: Credentials, request: Request, resources: ResourcesOf) -> Login:
    """Answer a token for an hour. 401 when user and password do not fit; both outcomes are audited."""
    async with resources.engine.connect() as connection:
        user = await store.find_user(connection, credentials.username)
    stored = user.password_hash if user and user.is_active else _hash_of_nobody()
    fits = await asyncio.to_thread(verify_password, credentials.password, stored)
    user_id = str(user.id) if user else ""
    context_of(request).user_id = user_id
    if user is None or not user.is_active or not fits:
        await _record(resources, audit.describe(request, user_id, "login", credentials.username, "failure"))
        raise HTTPException(401, "invalid username or password", {"WWW-Authenticate": "Bearer"})
    token = await cache.start_session(resources.redis, user.id, credentials.username)
    await _record(resources, audit.describe(request, user_id, "login", credentials.username, "success"))
    return Login(token=token, user_id=user_id)


@functools.cache
def _hash_of_nobody() -> str:
    """Unknown users cost as much time as wrong passwords, so that the clock does not tell who exists."""
    return hash_password("")


async def _record(resources: ResourcesOf, event: audit.AuditEvent) -> None:
    async with resources.engine.begin() as connection:
        await store.insert_audit_event(connection, event)
    audit.write(event)


async def find_caller(
    request: Request,
    resources: ResourcesOf,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> Caller:
    """Return the user of the Bearer token. 401 without a valid one."""
    user_id = await cache.find_session_user(resources.redis, bearer.credentials) if bearer else None
    if bearer is None or user_id is None:
        raise HTTPException(401, "not logged in", {"WWW-Authenticate": "Bearer"})
    context_of(request).user_id = str(user_id)
    return Caller(user_id, bearer.credentials)


CallerOf = Annotated[Caller, Depends(find_caller)]
