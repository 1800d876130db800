"""The lab's passwords stay where they belong while everything is restored, by a flow run with its records in Prefect."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import lifecycle
from tests.fixtures.watch import files_holding, holds, watching
from tests.recovery.conftest import System


@contextlib.contextmanager
def no_password_gets_out(
    system: System, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """While a full restore runs in the block: into no command line, log, report, backup, record of Prefect, or output.

    In the backups of the application, `.env` is meant to be: of those, all but the archive is read.
    """
    services, control = lifecycle.existing(system.name)
    secrets = dataclasses.astuple(services.state.passwords)
    assert len(set(secrets)) == 5
    caplog.set_level(logging.INFO)
    prefect = [logging.getLogger(name) for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")]
    for logger in prefect:  # these hand nothing on to the root logger
        logger.addHandler(caplog.handler)
    try:
        with watching() as watch:
            yield
    finally:
        for logger in prefect:
            logger.removeHandler(caplog.handler)
    for program, word in (
        ("pg_restore", "--jobs="),
        (Path(services.binaries.redis).name, "--unixsocketperm"),
        ("python", "tasks.gx.program"),
        ("python", "grc_backend"),
    ):
        assert watch.seen(program, word), f"{program} {word} was not started"
    assert watch.holding(secrets) == []

    layout = services.layout
    assert list(layout.reports.glob("*.md")), "the pages are beside the reports"
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
    assert not holds(f"{caplog.text}{printed.out}{printed.err}".encode(), secrets)
