"""clean_logs: old rotated files go; the log, what is open and what is young stay."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flows.logs.cleaning import clean_logs
from runbook.errors import NotConfirmed
from runbook.report import Status
from tasks.logs.rotation import cleaning
from tests.fixtures.logfiles import NAME


def file(path: Path, days: float) -> Path:
    path.write_text("x" * 1000)
    moment = (datetime.now() - timedelta(days=days)).timestamp()
    os.utime(path, (moment, moment))
    return path


@pytest.fixture
def old(logs: Path) -> list[Path]:
    """Two that may go, beside much that may not."""
    for name, days in (
        ("app.log", 99),
        ("app.log.1", 2),
        ("audit.log", 99),
        ("audit.log.9.gz", 99),
        ("app.log.old", 99),
    ):
        file(logs / name, days)
    return [file(logs / "app.log.31.gz", 31), file(logs / "app.log-20200101", 99)]


def test_the_plan_shows_what_goes_and_only_that_goes(logs: Path, old: list[Path]) -> None:
    before = set(logs.iterdir())
    plan = clean_logs.fn(NAME)
    assert plan.status is Status.PLANNED
    assert {step.detail.split(",")[0] for step in plan.plan_steps} == set(map(str, old))
    with pytest.raises(NotConfirmed):
        clean_logs.fn(NAME, confirm="production")
    assert set(logs.iterdir()) == before
    report = clean_logs.fn(NAME, confirm=NAME)
    assert report.outcome == "2 files deleted, 2.0 kB"
    assert set(logs.iterdir()) == before - set(old)
    assert "no rotated file" in clean_logs.fn(NAME, confirm=NAME).outcome
    assert clean_logs.fn(NAME, logs=("audit",), confirm=NAME).outcome.startswith("1 files")


def test_what_a_process_still_writes_to_stays(logs: Path, old: list[Path]) -> None:
    program = f"import sys; log = open({str(old[0])!r}, 'a'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"open\n"
        report = clean_logs.fn(NAME, confirm=NAME)
        writer.communicate()
    assert old[0].exists()
    assert not old[1].exists()
    assert f"(pid {writer.pid})" in report.sentence()
    assert clean_logs.fn(NAME, confirm=NAME).outcome.startswith("1 files")


def test_a_file_that_was_replaced_since_it_was_looked_at_stays(
    logs: Path, old: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cleaning.read_holders.work

    def rotated(files: object) -> cleaning.Holders:
        """Another file comes under the name while the run goes on."""
        old[0].unlink()
        file(old[0], 0)
        return real(files)  # type: ignore[arg-type]

    monkeypatch.setattr(cleaning.read_holders, "work", rotated)
    report = clean_logs.fn(NAME, confirm=NAME)
    assert old[0].exists()
    assert "files that were not deleted" in report.sentence()
