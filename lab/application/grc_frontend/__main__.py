"""Serve the page on FRONTEND_PORT of the environment, ``GRC_ENV_FILE`` or ``.env``: ``python -m grc_frontend``."""

from __future__ import annotations

import os
import sys

import uvicorn
from dotenv import dotenv_values

from .application import create_application


def main() -> None:
    files = (".env", os.environ.get("GRC_ENV_FILE") or os.devnull)  # the release's, then this host's
    told = [dotenv_values(path, interpolate=False, encoding="utf-8") for path in files]
    values = {**told[0], **told[1], **os.environ}
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
