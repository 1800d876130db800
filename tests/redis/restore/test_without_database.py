"""A full restore of an environment that has no database: Redis only, files only, or both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.application.files import backup_files
from flows.recovery.full_restore import full_restore
from flows.redis.persistence import backup_redis
from lab.processes import write
from runbook.errors import RunbookFailed
from runbook.report import Status
from tests.application.test_files import NAME as FILES_NAME
from tests.application.test_files import TOML as FILES
from tests.fixtures.reports import finding
from tests.redis.conftest import Rig
from tests.redis.servers import NAME


def backed_up(rig: Rig) -> None:
    for number in range(100):
        rig.client(number % 3).set(f"key:{number}", number)
    assert backup_redis.fn(NAME).status is Status.OK


def keys(rig: Rig) -> int:
    return sum(rig.client(number).dbsize() for number in range(3))


def test_redis_only(rig: Rig) -> None:
    """The whole server is dead and its directory is gone; the plan's own form is accepted."""
    backed_up(rig)
    rig.crash()
    shutil.rmtree(rig.data)
    planned = full_restore.fn(NAME)
    assert planned.status is Status.PLANNED, planned.sentence()
    assert "Redis goes back to" in planned.sentence()
    assert "are lost" in planned.sentence()
    report = full_restore.fn(NAME, confirm=NAME, **planned.pins)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert keys(rig) == 100
    assert "every write of Redis after" in report.facts["lost"]


def test_redis_that_serves_is_kept(rig: Rig) -> None:
    backed_up(rig)
    rig.client().set("since", 1)
    run_id = rig.run_id()
    report = full_restore.fn(NAME, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.outcome.startswith("nothing to restore: Redis at")
    assert (rig.run_id(), rig.client().get("since")) == (run_id, b"1")


def test_a_named_backup_of_redis(rig: Rig) -> None:
    """It sets a Redis that serves back, and says what that loses."""
    backed_up(rig)
    [backup] = {path.parent.name for path in rig.store.glob("*/manifest.json")}
    rig.client().set("since", 1)
    report = full_restore.fn(NAME, backup=backup, confirm=NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert (keys(rig), rig.client().get("since")) == (100, None)


def test_redis_and_its_backups_are_missing(rig: Rig) -> None:
    """Nobody starts it empty without being asked."""
    rig.crash()
    shutil.rmtree(rig.data)
    with pytest.raises(RunbookFailed) as caught:
        full_restore.fn(NAME, confirm=NAME)
    assert "without=redis" in finding(caught.value.report, "redis backup").hint


def test_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial.toml").write_text(FILES.format(base=tmp_path))
    monkeypatch.setenv("OPS_ENVIRONMENT", FILES_NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    upload = tmp_path / "opt" / "grc" / "cv.pdf"
    upload.parent.mkdir(parents=True)
    upload.write_bytes(content := os.urandom(50_000))
    backup_files.fn(FILES_NAME)
    shutil.rmtree(upload.parent)
    planned = full_restore.fn(FILES_NAME)
    assert planned.status is Status.PLANNED, planned.sentence()
    report = full_restore.fn(FILES_NAME, confirm=FILES_NAME, **planned.pins)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert upload.read_bytes() == content


@pytest.fixture
def with_files(rig: Rig, tmp_path: Path) -> Iterator[Path]:
    """An application's directory beside Redis, with a backup of its files; an upload in it."""
    plain, directory = rig.toml.read_text(), tmp_path / "opt" / "grc"
    more = f'files = "{tmp_path}/backups"\n[application]\ndirectory = "{directory}"\n'
    write(rig.toml, plain + more, 0o644)
    directory.mkdir(parents=True)
    (directory / "cv.pdf").write_bytes(b"a cv\n" * 1000)
    backup_files.fn(NAME)
    yield directory / "cv.pdf"
    write(rig.toml, plain, 0o644)


@pytest.mark.parametrize("given", [{"without": ("redis",)}, {"redis_source": "backup"}], ids=["waived", "no backup"])
def test_a_redis_that_is_not_restored_is_not_stopped(rig: Rig, with_files: Path, given: Any) -> None:
    """It has no backup and saves nothing: what it has is lost with its process."""
    rig.client().config_set("save", "")
    rig.client().config_set("appendonly", "no")
    rig.client().set("only in memory", 1)
    with_files.unlink()
    run_id = rig.run_id()
    planned = full_restore.fn(NAME, **given)
    assert "redis" not in [step.detail for step in planned.plan_steps if step.step == "stop services"]
    report = full_restore.fn(NAME, **given, confirm=NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert with_files.exists()
    assert (rig.run_id(), rig.client().get("only in memory")) == (run_id, b"1")
