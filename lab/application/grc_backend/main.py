"""``uvicorn grc_backend.main:app`` (manual, appendix); services run ``python -m grc_backend``."""

from __future__ import annotations

from .application import create_application
from .settings import Settings

app = create_application(Settings.load())
