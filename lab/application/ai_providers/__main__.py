"""Serve the three providers on AI_PROVIDERS_PORT of the environment or ``.env``: ``python -m ai_providers``."""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit

import uvicorn
from dotenv import dotenv_values

from .application import create_application


def main() -> None:
    values = {**dotenv_values(".env", interpolate=False, encoding="utf-8"), **os.environ}
    # The backend's .env names the same place by its URL.
    address = urlsplit(values.get("AI_PROVIDERS_URL") or "")
    port = values.get("AI_PROVIDERS_PORT") or address.port
    if not port:
        sys.exit("ai_providers: AI_PROVIDERS_PORT is missing in .env and in the environment")
    uvicorn.run(
        create_application(),
        host=address.hostname or "127.0.0.1",
        port=int(port),
        http="h11",
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
