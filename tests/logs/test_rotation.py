"""rotate_logs where it cannot be; with the real logrotate: tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.logs.rotation import rotate_logs
from runbook.errors import OpsError
from tasks.logs import rotation
from tests.logfiles import NAME, line


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
