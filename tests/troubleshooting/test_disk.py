"""free-disk-emergency: what uses the space, what is deleted, and that it works without free disk space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.troubleshooting import disk
from runbook.report import Status
from tests.troubleshooting.conftest import Host, evidence

KEPT = "grc_db__old_20260101_000000"
ROOT = Path(__file__).parents[2]
STAYS = {
    "pg/pg_wal/000000010000000000000001",
    "log/app.log",
    "log/app.log.2",
    "log/app.log.3",
    "backups/postgresql/.partial-other-postgres_20260101_000000/toc.dat",
    "tmp/ops-pg-live/postmaster.pid",
    "tmp/ops-pip-young/wheel",
    "tmp/ops-redis-ours/data/dump.rdb",
    "backups/redis/.partial-full-redis_20260101_000000/dump.rdb",
}
GOES = ("tmp/ops-wal-dead", "backups/postgresql/.partial-full-postgres_20260101_000000", "log/app.log.1")


@pytest.fixture
def half_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system, however full those of this host are."""
    real = os.statvfs

    def half(path: str | Path) -> os.statvfs_result:
        found = real(path)
        blocks, files = found.f_blocks // 2, found.f_files // 2
        free = (blocks, blocks, found.f_files, files, files)
        return os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, *free, found.f_flag, found.f_namemax))

    monkeypatch.setattr(os, "statvfs", half)


@pytest.mark.usefixtures("half_full")
def test_a_disk_with_free_space_keeps_everything_and_slots_are_only_reported(host: Host) -> None:
    host.server.sql("SELECT pg_create_physical_replication_slot('forgotten', true)")
    host.server.create_database(KEPT)
    try:
        report = disk.free_disk_emergency.fn(environment="sick", confirm="sick")
        assert host.server.sql("SELECT count(*) FROM pg_replication_slots") == [(1,)]
    finally:
        host.server.sql("SELECT pg_drop_replication_slot('forgotten')")
        host.server.drop_database(KEPT)
    held = {row[0]: row[2] for row in evidence(report, "What uses the space").rows}
    (slot,) = [advice for what, advice in held.items() if what.startswith("WAL retained by the slot forgotten (unused")]
    assert "decide whether to drop it" in slot
    assert "never delete files" in held["pg_wal in total, measured by the server"]
    follow = evidence(report, "Run next").text
    assert "check-replication" in follow
    assert f"'names=[\"{KEPT}\"]'" in next(line for line in follow.splitlines() if "discard-superseded" in line)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A plan and a run on a disk without a byte left."""
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    argv = [*alone, sys.executable, "-m", "tests.troubleshooting.full_disk", str(tmp_path_factory.mktemp("full"))]
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_the_plan_is_shown_where_nothing_can_be_written(full: list[dict[str, Any]]) -> None:
    planned, *_ = full
    assert planned["free"] == 0
    assert [Path(step["detail"].split(",")[0]).as_posix().partition("/disk/")[2] for step in planned["plan"]] == [*GOES]
    assert all(step["bytes"] >= 500_000 for step in planned["plan"])
    assert len(planned["left"]) == len(STAYS) + len(GOES)
    assert any("report could not be written" in one["name"] for one in planned["findings"])
    assert "/disk/log/app.log.1" in planned["page"]


def test_what_can_be_deleted_is_and_all_else_is_kept(full: list[dict[str, Any]]) -> None:
    _, done, _ = full
    assert set(done["left"]) == STAYS
    assert done["free"] >= 3 * 500_000
    assert done["written"]
    assert done["outcome"].startswith("3 of 3 removed, 1.")
    kept = next(one for one in done["evidence"] if one["name"].startswith("Scratch"))
    why = {Path(path).name: reason for path, reason in kept["rows"]}
    assert "uses it" in why["ops-pg-live"]
    assert "written to" in why["ops-pip-young"]


def test_what_is_still_too_full_afterwards_is_critical(full: list[dict[str, Any]]) -> None:
    _, done, _ = full
    assert done["status"] == Status.WARN.value
    assert [one["status"] for one in done["findings"] if "afterwards" in one["name"]] == ["WARN"]
    assert any(one["name"] == "not measured: the database" for one in done["findings"])
    rows = next(one for one in done["evidence"] if one["name"].startswith("What uses"))["rows"]
    assert any(what.endswith("/pg/pg_wal") and "never" in advice for what, _, advice in rows)


def test_wal_s_own_file_system_without_an_inode_is_full_too(full: list[dict[str, Any]]) -> None:
    *_, of_wal = full
    (found,) = [one for one in of_wal["findings"] if "/wal: " in one["name"]]
    assert found["status"] == Status.WARN.value
    assert "100% of its inodes used" in found["name"]
    rows = next(one for one in of_wal["evidence"] if one["name"].startswith("What uses"))["rows"]
    assert any(what.startswith("postgres: pg_wal") and "never" in advice for what, _, advice in rows)
