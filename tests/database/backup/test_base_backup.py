"""Base backups: taken, verified by PostgreSQL before they are offered, verified by a restore."""

from __future__ import annotations

import io
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.database.backup import verify_backup
from flows.database.base_backup import backup_cluster
from runbook.errors import OpsError
from runbook.report import Status
from tasks.backups import catalogue, codec, manifest
from tasks.cluster import base_backup
from tasks.cluster.content import cluster_in
from tasks.cluster.unpack import BASE, GZIP_BASE, GZIP_WAL
from tests.database.backup.test_backup import run
from tests.database.conftest import NAME, Trial
from tests.fixtures.bits import flip
from tests.fixtures.servers import binaries

BACKUP = "flows.database.base_backup.backup_cluster"


def store_of(trial: Trial) -> Path:
    return trial.store.parent / "cluster"


def test_a_base_backup_is_offered_and_restores_on_a_private_instance(trial: Trial) -> None:
    ascii = f"{trial.database}_ascii"  # a database that knows no encoding, with bytes that are no UTF-8
    trial.sql(f"CREATE DATABASE {ascii} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    trial.server.sql(r"CREATE TABLE t AS SELECT convert_from('\x83'::bytea, 'SQL_ASCII') AS w", database=ascii)
    report = backup_cluster.fn(NAME)
    assert report.status is Status.WARN, "fsync is off on the tests' server, and no WAL is archived"
    assert "archived WAL" in {finding.name for finding in report.findings if finding.status is Status.WARN}
    name = report.facts["backup"]
    content = cluster_in(catalogue.open_backup(verify_store(trial), name))
    system = trial.sql("SELECT system_identifier FROM pg_control_system()")[0][0]
    assert (content.form, content.system, content.timeline) == ("full", system, 1)
    assert content.start < content.stop
    proven = verify_backup.fn(NAME, kind="cluster")
    (read,) = [evidence.rows for evidence in proven.evidence if evidence.name == "Read on the private instance"]
    assert {trial.database, ascii} <= {row[0] for row in read}
    assert catalogue.open_backup(verify_store(trial), name).verified
    slots = trial.sql("SELECT count(*) FROM pg_replication_slots")
    assert slots == [(0,)], "the slot that kept the backup's WAL was temporary"
    as_of_an_earlier_version(store_of(trial) / name)
    assert verify_backup.fn(NAME, kind="cluster").status is proven.status


def as_of_an_earlier_version(backup: Path) -> None:
    """Rewrite a backup as earlier versions stored it: two tars, compressed with gzip."""
    folder = "pg_wal/"
    with (
        tarfile.open(fileobj=io.BytesIO(codec.decompress((backup / BASE).read_bytes()))) as whole,
        tarfile.open(backup / GZIP_BASE, "w:gz", compresslevel=1) as base,
        tarfile.open(backup / GZIP_WAL, "w:gz", compresslevel=1) as wal,
    ):
        for member in whole:
            target = base
            if member.isreg() and member.name.startswith(folder):
                target, member.name = wal, member.name.removeprefix(folder)
            if member.name != "backup_manifest":
                target.addfile(member, whole.extractfile(member) if member.isreg() else None)
    (backup / BASE).unlink()
    described = manifest.read(backup)
    manifest.write(backup, described.model_copy(update={"files": manifest.sums_of(backup)}))


def verify_store(trial: Trial) -> catalogue.Store:
    from tasks.stores.store import store_of as chosen

    return chosen(trial.environment, "cluster")


def test_a_copy_that_is_not_what_the_server_sent_is_never_offered(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(_: str) -> None:
        """A bit of what is compressed: zstd finds it, or the comparison does, depending on where it lies."""
        (tar,) = store_of(trial).glob(".partial-*/base.tar.zst")
        flip(tar)

    monkeypatch.setattr(base_backup, "failpoint", spoil)
    with pytest.raises(OpsError, match="differs from what the server sent"):
        backup_cluster.fn(NAME)
    assert [path.name for path in store_of(trial).iterdir() if not path.name.startswith(".")] == []


def test_an_incremental_one_needs_a_full_one_and_a_server_that_keeps_account(trial: Trial) -> None:
    with pytest.raises(OpsError, match="summarize_wal"):
        backup_cluster.fn(NAME, kind="incremental")
    report = backup_cluster.fn(NAME, kind="auto")
    assert report.status is Status.OK, "the daily run of such a server is not red: the weekly full ones are kept"
    why = "summarize_wal is off" if binaries().postgres_major >= 17 else "supports no incremental base backups"
    assert why in report.outcome
    assert not store_of(trial).exists() or list(store_of(trial).glob("base_*")) == []


# A copy is there, not verified; it is offered. The soak takes every point that a run passes.
BOUNDARIES = ("base backup: copied", "after publish")


def require_never_half(trial: Trial, points: Sequence[str]) -> None:
    """Killed at each of them: what is offered is whole, and the next run leaves nothing behind."""
    whole = {path.name for path in store_of(trial).glob("base_*")}
    for point in points:
        assert run(BACKUP, OPS_FAILPOINT=point).returncode == -signal.SIGKILL, point
        known, _ = catalogue.open_all(verify_store(trial), "cluster")
        assert whole <= {one.name for one in known}, point
        for one in known:
            assert manifest.damage(one.path, one.manifest.files) == [], point
        whole = {one.name for one in known} | {backup_cluster.fn(NAME).facts["backup"]}
        assert {path.name for path in store_of(trial).iterdir() if path.name != ".verified"} == whole, point


def test_killed_at_a_boundary_nothing_half_is_offered_and_the_next_run_sweeps(trial: Trial) -> None:
    require_never_half(trial, BOUNDARIES)


@pytest.mark.soak
def test_killed_anywhere_nothing_half_is_offered_and_the_next_run_sweeps(trial: Trial, tmp_path: Path) -> None:
    log = tmp_path / "points"
    assert run(BACKUP, OPS_FAILPOINT_LOG=str(log)).returncode == 0
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert set(BOUNDARIES) <= set(points)
    require_never_half(trial, points)
