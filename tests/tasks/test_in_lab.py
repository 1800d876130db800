"""The same tasks against the real application, database and supervisor of the lab."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocks.config import toml
from blocks.environment import Environment
from flows.application.files import backup_files
from lab.client import Lab
from runbook.errors import OpsError
from runbook.report import Status
from tasks.application.health import smoke_check, wait_healthy
from tasks.host.services import read_services, start_services, stop_services
from tasks.integrity import run_expectations
from tasks.logs.figures.writes import read_writes_since
from tasks.migrations.alembic import read_revision
from tasks.migrations.scripts import read_heads
from tests.tasks.conftest import SUITES


@pytest.fixture
def environment(lab: Lab) -> Environment:
    return toml.environment(lab.name)


def test_the_smoke_checks_pass_and_their_writes_are_counted(environment: Environment) -> None:
    before = datetime.now(UTC)
    wait_healthy(environment.application, seconds=300)
    earlier = Counter(dict(read_writes_since(environment.logs, before).by_kind))  # a drill's service with a wrong clock

    result = smoke_check(environment.application)

    assert result.ok, result.detail
    writes = read_writes_since(environment.logs, before)
    assert writes.complete, writes.note
    found = Counter(dict(writes.by_kind)) - earlier
    assert found == {"POST /api/interview/sessions": 1, "POST /api/interview/sessions/{id}/messages": 1}


def test_the_labs_data_is_sound_at_the_head(environment: Environment, tmp_path: Path) -> None:
    postgres = environment.postgres
    assert read_revision(postgres, postgres.database) == read_heads(environment.application).one()
    assert run_expectations(postgres, postgres.database, tmp_path, SUITES).failed == ()


def test_a_stopped_backend_is_unhealthy_and_a_started_one_works(environment: Environment) -> None:
    stop_services(environment.services, ["backend"])
    try:
        assert read_services(environment.services, ["backend"]).stopped == ("backend",)
        with pytest.raises(OpsError, match="backend at .* does not answer"):
            wait_healthy(environment.application, seconds=1)
        assert not smoke_check(environment.application).ok
    finally:
        start_services(environment.services, ["backend"])
        wait_healthy(environment.application, seconds=300)


def test_the_applications_files_are_backed_up(environment: Environment) -> None:
    report = backup_files.fn(environment.name)
    assert report.status is Status.OK, report.sentence()
