"""The lab's passwords stay where they belong while everything is restored, by a flow run with its records in Prefect."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from flows.recovery.full_restore import full_restore
from lab import lifecycle
from runbook.report import Report, Status
from tests.fixtures.watch import files_holding, holds, watching
from tests.recovery.conftest import System


def test_no_password_gets_out(
    system: System, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the backups of the application, `.env` is meant to be: of those, all but the archive is read."""
    services, control = lifecycle.existing(system.name)
    secrets = dataclasses.astuple(services.state.passwords)
    assert len(set(secrets)) == 5
    caplog.set_level(logging.INFO)
    prefect = [logging.getLogger(name) for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")]
    for logger in prefect:  # these hand nothing on to the root logger
        logger.addHandler(caplog.handler)
    try:
        with watching() as watch:
            report: Report = full_restore(system.name, method="dump", confirm=system.name)
    finally:
        for logger in prefect:
            logger.removeHandler(caplog.handler)
    assert report.status in (Status.OK, Status.WARN)
    for program, word in (
        ("pg_restore", "--jobs="),
        (Path(services.binaries.redis).name, "--unixsocketperm"),
        ("python", "tasks.gx.program"),
        ("python", "grc_backend"),
    ):
        assert watch.seen(program, word), f"{program} {word} was not started"
    assert watch.holding(secrets) == []

    assert report.path
    assert report.path.with_suffix(".md").exists()
    layout = services.layout
    stores = [path for kind in ("postgresql", "redis", "files") for path in layout.store(kind).rglob("*")]
    assert {"globals.sql", "dump.rdb", "manifest.json"} <= {path.name for path in stores}
    looked_at = [
        layout.reports,
        *(path for path in stores if path.is_file() and path.suffix not in (".gz", ".zst")),
        *system.lab.logs(),
        control.layout.home,
    ]
    assert any(path.name.startswith("prefect.db") for path in control.layout.home.iterdir()), "Prefect's database"
    assert files_holding(looked_at, secrets) == []

    printed = capfd.readouterr()
    assert report.sentence() in caplog.text, "the log of the run is really read"
    assert not holds(f"{caplog.text}{printed.out}{printed.err}".encode(), secrets)
