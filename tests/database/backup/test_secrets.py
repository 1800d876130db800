"""Passwords stay where they belong: on no command line, in no report, no backup and no log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from flows.database.restore import restore_database
from flows.database.superseded import discard_superseded
from tests.database.conftest import NAME, Trial
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD
from tests.fixtures.watch import files_holding, holds, watching

SECRETS = (ADMIN_PASSWORD, ROLE_PASSWORD)


def test_no_password_gets_out(
    trial: Trial, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both have characters that a URL quotes: they would be found in either spelling."""
    caplog.set_level(logging.DEBUG)
    with watching() as watch:
        backup_database.fn(NAME)
        restore_database.fn(NAME, confirm=NAME)
        discard_superseded.fn(NAME, keep=0, confirm=NAME)
    for program, word in (("pg_dumpall", "--globals-only"), ("pg_dump", "--snapshot="), ("pg_restore", "--jobs=")):
        assert watch.seen(program, word), f"{program} was not started"
    assert watch.holding(SECRETS) == []

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".json", ".md", ".sql", ".dat"} <= {path.suffix for path in written}, "reports, roles, the dump"
    assert len(list(trial.reports.glob("*.json"))) == 3
    assert files_holding([tmp_path], SECRETS) == []

    printed = capfd.readouterr()
    assert "find superseded" in caplog.text, "the log is really read"
    assert not holds(f"{caplog.text}{printed.out}{printed.err}".encode(), SECRETS)
