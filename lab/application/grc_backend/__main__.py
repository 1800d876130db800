"""Serve the backend on HOST and PORT of ``.env``: ``python -m grc_backend``."""

from __future__ import annotations

import sys

import uvicorn

from .application import create_application
from .settings import InvalidSettings, Settings

# In-flight requests get this long after SIGTERM; with closing the pools the process ends within 3 s.
GRACEFUL_STOP_SECONDS = 2


def main() -> None:
    try:
        settings = Settings.load()
    except InvalidSettings as error:
        sys.exit(f"grc_backend: {error}")
    uvicorn.run(
        create_application(settings),
        host=settings.host,
        port=settings.port,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACEFUL_STOP_SECONDS,
    )


if __name__ == "__main__":
    main()
