"""What differs between PostgreSQL 15, 16, 17 and 18, and what a server without contrib is told about."""

from __future__ import annotations

import os

import pytest

from flows.database.server.connections import check_connections
from flows.database.server.corruption import check_corruption
from flows.database.server.settings import check_postgres_settings
from flows.database.upkeep.indexes import check_indexes
from flows.database.upkeep.vacuum import check_autovacuum
from runbook.errors import RunbookFailed
from runbook.report import Status
from tests.database.conftest import NAME, Trial
from tests.database.conftest import trial as trial  # the fixture
from tests.fixtures.servers import has_contrib
from tests.matrix.versions import EMBEDDED, VARIABLE


def major(trial: Trial) -> int:
    return int(str(trial.sql("SHOW server_version_num")[0][0])) // 10_000


def test_the_server_is_the_one_that_was_asked_for(trial: Trial) -> None:
    asked = os.environ.get(VARIABLE) or str(EMBEDDED)
    assert str(major(trial)) == asked or asked.startswith("/")


def test_no_check_asks_for_what_this_version_does_not_have(trial: Trial) -> None:
    """Each reads catalogue columns that came or went between 15 and 18."""
    for flow in (check_autovacuum, check_indexes, check_connections, check_postgres_settings):
        report = flow.fn(NAME)
        assert report.status in (Status.OK, Status.WARN), report.sentence()
        assert "not measured" not in {finding.name for finding in report.findings}, report.sentence()


def test_a_server_without_contrib_is_told_what_is_not_checked(trial: Trial) -> None:
    report = check_corruption.fn(NAME)
    (heap,) = [finding for finding in report.findings if finding.name == "heap and indexes"]
    assert heap.status is Status.WARN
    assert heap.value == "not measured: amcheck is not installed"
    assert ("install the contrib package" in heap.hint) == (not has_contrib())
    assert report.outcome == "heap and indexes were not checked: amcheck is missing"
    if has_contrib():
        assert check_corruption.fn(NAME, install=True).status is Status.PLANNED
    else:
        with pytest.raises(
            RunbookFailed, match="amcheck is not available on this server. Next: install the contrib package"
        ):
            check_corruption.fn(NAME, install=True, confirm=NAME)
