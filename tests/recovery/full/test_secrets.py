"""The lab's passwords stay where they belong while everything is restored, by a flow run with its records in Prefect."""

from __future__ import annotations

import dataclasses
import logging
import re
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
            report: Report = full_restore(system.name, method="dump", redis_source="backup", confirm=system.name)
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

    ours = [one for one in caplog.records if one.name in ("prefect.flow_runs", "prefect.task_runs")]
    _assert_steps(report, [one.getMessage() for one in ours if one.levelno >= logging.INFO])
    printed = capfd.readouterr()
    assert report.sentence() in caplog.text, "the log of the run is really read"
    assert not holds(f"{caplog.text}{printed.out}{printed.err}".encode(), secrets)


def _assert_steps(report: Report, lines: list[str]) -> None:
    """Every planned step is in the run's log in the plan's order, with its number, its estimate, and then its time."""
    total = len(report.plan_steps)
    named = [f"Step {number}/{total}: {one.step}" for number, one in enumerate(report.plan_steps, 1)]
    steps = [line for line in lines if line.startswith("Step ")]
    for name, planned in zip(named, report.plan_steps, strict=True):
        begun, *rest = [line for line in steps if line.startswith(f"{name}: ")]
        assert begun.startswith(f"{name}: {planned.detail}")
        assert ("about" in begun or "less than" in begun) == bool(planned.seconds)
        assert re.fullmatch(rf"{re.escape(name)}: done in [\d.]+ s", rest[-1]), rest
    places = [steps.index(next(line for line in steps if line.startswith(name))) for name in named]
    swap = [one.step for one in report.plan_steps].index("swap")
    assert places[swap:] == sorted(places[swap:]), "those before run at the same time"
    assert max(places[:swap]) < places[swap]
    assert lines[-1].startswith("report in Prefect: http")
