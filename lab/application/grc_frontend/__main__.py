"""Serve the page on FRONTEND_PORT of the environment or ``.env``: ``python -m grc_frontend``."""

from __future__ import annotations

import os
import sys

import uvicorn
from dotenv import dotenv_values

from .application import create_application


def main() -> None:
    values = {**dotenv_values(".env", interpolate=False, encoding="utf-8"), **os.environ}
    port, backend_url = values.get("FRONTEND_PORT"), values.get("BACKEND_URL")
    if not port or not backend_url:
        sys.exit("grc_frontend: FRONTEND_PORT and BACKEND_URL are needed in .env or in the environment")
    uvicorn.run(
        create_application(backend_url),
        host=values.get("HOST") or "127.0.0.1",
        port=int(port),
        http="h11",
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
