"""The application: routes, resources for its lifetime, and what a dead server means to a client."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.types import ASGIApp

from . import authentication, health, interview, logs
from .access import AccessLog, context_of
from .ai import AllProvidersFailed
from .resources import Resources
from .settings import Settings

logger = logging.getLogger(__name__)


def create_application(settings: Settings) -> ASGIApp:
    """Return the ASGI application. Opens the log files; connects to nothing yet."""
    logs.configure(settings.log_directory)
    application = FastAPI(title="AI面接システム", lifespan=_lifespan)
    application.state.settings = settings
    for router in (health.router, authentication.router, interview.router):
        application.include_router(router)
    for error in (DBAPIError, PoolTimeout, RedisError, AllProvidersFailed):
        application.add_exception_handler(error, _answer_unavailable)
    application.add_exception_handler(RequestValidationError, _answer_invalid)
    return AccessLog(application)


@asynccontextmanager
async def _lifespan(application: FastAPI) -> AsyncIterator[None]:
    resources = Resources.open(application.state.settings)
    application.state.resources = resources
    yield
    await resources.close()


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """422 with where and why, without FastAPI's echo of the input: it may be a password, or no valid Unicode."""
    assert isinstance(error, RequestValidationError)
    problems = [{key: problem[key] for key in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, status_code=422)


async def _answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    """503: nothing was stored, or nobody knows (a connection lost during COMMIT); the client may ask again."""
    what = "AI providers" if isinstance(error, AllProvidersFailed) else "database"
    what = "redis" if isinstance(error, RedisError) else what
    logger.error("%s unavailable", what, extra={"error": str(error), "request_id": context_of(request).request_id})
    return JSONResponse({"detail": f"{what} unavailable"}, status_code=503)
