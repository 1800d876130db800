"""The connection pool of manual §1.5."""

from __future__ import annotations

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .settings import Settings

CONNECT_TIMEOUT_SECONDS = 5


def create_engine(settings: Settings) -> AsyncEngine:
    """Return the pool; nothing is connected yet, so that the backend starts while the database is down.

    ``pool_pre_ping`` replaces connections that a restart, a failover or a restore's swap has ended.
    """
    return create_async_engine(
        make_url(settings.database_url).set(drivername="postgresql+psycopg"),
        pool_size=settings.database_pool_size,
        max_overflow=settings.database_max_overflow,
        pool_timeout=settings.database_pool_timeout,
        pool_recycle=settings.database_pool_recycle,
        echo=settings.database_echo,
        pool_pre_ping=True,
        hide_parameters=True,  # errors are logged; what candidates wrote does not belong there
        connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS, "application_name": "grc_backend"},
    )
