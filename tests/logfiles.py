"""An environment whose logs are files of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

NAME = "trial"
TOML = """
name = "trial"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[logs]
app = "{base}/log/app.log"
audit = "{base}/log/audit.log"
rotation = "{base}/logrotate.conf"
access_logger = "grc_backend.access"
access_message = "request"
not_data = ["/api/auth/"]
ai_message = "AI API Call"
"""
NOON = datetime(2026, 2, 15, 12, tzinfo=UTC)


def line(message: str, at: datetime = NOON, level: str = "INFO", **fields: object) -> str:
    """As the application writes it (§6.1)."""
    entry = {"timestamp": at.isoformat(), "level": level, "logger": "grc", "message": message, "module": "interview"}
    return json.dumps(entry | fields, ensure_ascii=False) + "\n"


def every(seconds: float, count: int, at: datetime = NOON) -> Iterator[datetime]:
    """Moments from one on."""
    return (at + timedelta(seconds=seconds * number) for number in range(count))


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the logs, empty."""
    (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    (tmp_path / "log").mkdir()
    return tmp_path / "log"
