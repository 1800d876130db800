"""An environment whose certificates are a test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runbook.report import Finding, Report, Status
from tasks.certificates import schedules, served, stapling
from tests.infrastructure.authority import Authority
from tests.runbook.processes import prefect_server

__all__ = ["prefect_server"]

NAME = "trial"
TOML = """
name = "trial"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[certificates]
directory = "{base}/live"
authorities = "{base}/root.pem"
domains = {domains}
served = {served}
{more}
"""
Register = Callable[..., Path]


def bad(report: Report) -> dict[str, Finding]:
    """What is not well, by name."""
    return {finding.name: finding for finding in report.findings if finding.status is not Status.OK}


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> Register:
    """Write the environment's TOML; returns the directory of certificates. This host's own schedules are not seen."""
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    monkeypatch.setattr(schedules, "ROOT", tmp_path / "host")
    monkeypatch.setattr(served, "PATIENCE_SECONDS", 90.0)  # of a machine that does much else
    monkeypatch.setattr(stapling, "PATIENCE_SECONDS", 90)
    (tmp_path / "root.pem").write_bytes(authority.root.chain)

    def write(domains: Sequence[str] = ("app.test",), served: Sequence[str] = (), more: str = "") -> Path:
        text = TOML.format(base=tmp_path, domains=list(domains), served=list(served), more=more)
        (tmp_path / "trial.toml").write_text(text)
        (tmp_path / "live").mkdir(exist_ok=True)
        return tmp_path / "live"

    return write
