"""Receivers of alerts, and an environment that knows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.receivers import http_receiver, smtp_receiver
from tests.monitoring.duty import Duty, prepare
from tests.runbook.processes import prefect_server

__all__ = ["duty", "prefect_server"]


@pytest.fixture
def duty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Duty]:
    with http_receiver() as web, smtp_receiver() as mail:
        yield prepare(tmp_path, web, mail, monkeypatch)
