"""free-disk-emergency: what holds the space, what goes, and that it works where nothing can be written."""

from __future__ import annotations

from pathlib import Path

from flows.troubleshooting import disk
from runbook.report import Status
from tests.troubleshooting.conftest import Host, evidence


def test_of_a_disk_with_room_nothing_goes(host: Host, tmp_path: Path) -> None:
    report = disk.free_disk_emergency.fn(environment="sick", confirm="sick")
    assert report.status in (Status.OK, Status.WARN)
    assert "pg_wal" in str(evidence(report, "What holds the space").rows)
