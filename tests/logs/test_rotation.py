"""rotate_logs where it cannot be; with the real logrotate: tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.logs.rotation import rotate_logs, worth_reading
from runbook.errors import OpsError
from tasks.logs.rotation import rotation
from tests.fixtures.logfiles import NAME, line


def test_without_logrotate_it_says_how_to_install_it_and_renames_nothing(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PLACES", "")
    (logs / "app.log").write_text(line("x"))
    with pytest.raises(OpsError, match="logrotate is not installed on this host.*apt install logrotate"):
        rotate_logs.fn(NAME, confirm=NAME)
    assert [path.name for path in logs.iterdir()] == ["app.log"]


def test_without_a_log_or_a_configuration_it_is_refused(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (logs.parent / "logrotate").write_text("#!/bin/sh\n")
    (logs.parent / "logrotate").chmod(0o755)
    monkeypatch.setattr(rotation, "PLACES", str(logs.parent))
    (logs / "app.log.1").write_text(line("x"))
    with pytest.raises(OpsError, match="only rotated files"):
        rotate_logs.fn(NAME, confirm=NAME)
    (logs / "app.log").write_text(line("x"))
    with pytest.raises(OpsError, match="0 blocks of .*logrotate.conf cover it"):
        rotate_logs.fn(NAME, confirm=NAME)


def test_what_logrotate_said_of_files_that_are_not_there_is_left_out() -> None:
    said = "\n".join(
        (
            "rotating pattern: app.log",
            "renaming app.log.2.gz to app.log.3.gz (rotatecount 30, logstart 1, i 2), ",
            "old log app.log.2.gz does not exist",
            "renaming app.log.1.gz to app.log.2.gz (rotatecount 30, logstart 1, i 1), ",
            "old log app.log.1.gz does not exist",
            "renaming app.log to app.log.1",
            "error: no room",
        )
    )
    assert worth_reading(said).splitlines() == [
        "rotating pattern: app.log",
        "renaming app.log to app.log.1",
        "error: no room",
    ]
