"""diagnose-database where the server's own disk has no byte left: a small one, which needs root to be mounted."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.troubleshooting.database import diagnose_database
from runbook.errors import RunbookFailed
from runbook.report import Report
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.troubleshooting.conftest import cause, evidence, following

pytestmark = pytest.mark.system  # as root: it mounts
TOML = """
name = "sick"
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
port = {server.port}
database = "grc_db"
user = "grc_user"
password_env = "SICK_PASSWORD"
admin_password_env = "SICK_ADMIN_PASSWORD"
data_directory = "{server.data}"
[services]
names = {{}}
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresServer]:
    """A server that fills its disk, and its environment."""
    server = PostgresServer(settings=["min_wal_size=32MB", "max_wal_size=32MB"])
    account = server.account
    options = f"size=160m,mode=755,uid={account.uid},gid={account.gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", server.root], check=True)
    try:
        server.initdb()
        server.start()
        server.create_database("grc_db")
        toml = tmp_path / "sick.toml"
        toml.write_text(TOML.format(server=server, reports=tmp_path / "reports"))
        for name, value in {
            "OPS_ENVIRONMENT": "sick",
            "OPS_ENVIRONMENT_FILE": str(toml),
            "SICK_PASSWORD": ROLE_PASSWORD,
            "SICK_ADMIN_PASSWORD": ADMIN_PASSWORD,
        }.items():
            monkeypatch.setenv(name, value)
        yield server
    finally:
        server.crash()
        subprocess.run(["umount", "--lazy", server.root], check=True)
        server.remove()


def diagnosed() -> Report:
    """Its report, which is critical."""
    with pytest.raises(RunbookFailed) as failed:
        diagnose_database.fn(environment="sick")
    return failed.value.report


def test_a_full_disk_is_the_cause_before_and_after_the_server_ended(small: PostgresServer) -> None:
    with contextlib.suppress(OSError), (small.root / "fill").open("wb", buffering=0) as file:
        while file.write(b"0" * 65_536):
            pass
    report = diagnosed()
    assert cause(report).startswith("the disk of PostgreSQL is full: 0 B of")
    assert "No space left on device" in str(evidence(report, "Decision tree").rows)
    assert "free-disk-emergency" in following(report).splitlines()[0]
    small.crash()
    report = diagnosed()
    assert cause(report).startswith("the disk of PostgreSQL is full: 0 B of")
    assert "is down" in report.findings[1].value
