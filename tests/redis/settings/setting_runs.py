"""check-, apply- and undo-redis-settings on a test's server, and what they left there."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.redis.settings.settings import apply_redis_settings, check_redis_settings, undo_redis_settings
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.redis.settings.file import read_configuration
from tasks.reports import setting_records as records
from tests.fixtures import forked
from tests.redis.servers import NAME, RedisServer

ROOT = Path(__file__).parents[3]
MANUAL = ("save 900 1 300 10 60 10000", "appendonly yes", "timeout 300")
KEYS = 2000


def fill(server: RedisServer) -> None:
    with server.client().pipeline(transaction=False) as pipe:
        for n in range(KEYS):
            pipe.set(f"key:{n}\0\n", "x" * 50)
        pipe.execute()


def check() -> Report:
    try:
        return check_redis_settings.fn(NAME)
    except RunbookFailed as error:
        return error.report


def apply(**parameters: Any) -> Report:
    return apply_redis_settings.fn(NAME, confirm=NAME, **parameters)


def undo(**parameters: Any) -> Report:
    return undo_redis_settings.fn(NAME, confirm=NAME, **parameters)


def bad(report: Report) -> set[str]:
    return {finding.name for finding in report.findings if finding.status is not Status.OK}


def table(report: Report, start: str) -> dict[str, tuple[str, ...]]:
    return next(({row[0]: row[1:] for row in item.rows} for item in report.evidence if item.name.startswith(start)), {})


def runs(server: RedisServer, name: str) -> str:
    return str(server.client().config_get(name)[name])


def written(server: RedisServer, name: str) -> str:
    return read_configuration(server.configuration).get(name, "nothing")


def record_paths(server: RedisServer) -> list[Path]:
    return sorted((server.root / "reports" / records.FOLDER).glob("*.json"))


def expire(server: RedisServer) -> None:
    """All overrides: as if their hours had gone by, and one more."""
    for path in record_paths(server):
        told = json.loads(path.read_text())
        if told["until"]:
            taken, until = ((datetime.now(UTC) - timedelta(hours=hours)).isoformat() for hours in (2, 1))
            path.write_text(json.dumps({**told, "taken": taken, "until": until}))


def told_of(server: RedisServer, number: int = -1) -> dict[str, Any]:
    """One of its records, the newest unless another is asked for."""
    return dict(json.loads(record_paths(server)[number].read_text()))


def plan(**parameters: Any) -> Report:
    """Of an apply."""
    return apply_redis_settings.fn(NAME, **parameters)


def launch(parameters: str = "", flow: str = "apply", **environment: str) -> int:
    """apply- or undo-redis-settings in a process of its own; returns how that ended."""
    code = f"from flows.redis.settings.settings import *; {flow}_redis_settings.fn({NAME!r}, confirm={NAME!r}, {parameters})"
    return forked.run(["-c", code], {**os.environ, **environment}, capture=False).returncode
