"""The live server's configuration stays when its data directory is replaced, and is tried before."""

from __future__ import annotations

import signal
from pathlib import Path

import psycopg
import pytest

from flows.database.base_backup import backup_cluster
from flows.recovery.point.restore import restore_to_point
from lab.processes import write
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from tests.fixtures.postgres.clusters import NAME, Cluster
from tests.recovery.point.test_point_in_time_killed import launch
from tests.recovery.postgres_failovers import fail_over, process

TRUST, SCRAM = (
    f"host all all 127.0.0.1/32 {method}\nhost replication all 127.0.0.1/32 scram-sha-256\n"
    for method in ("trust", "scram-sha-256")
)


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


@pytest.fixture
def edited(cluster: Cluster) -> Cluster:
    """A server whose configuration is in its data directory, and was edited after the base backup: it trusted everybody
    then, and had a file in conf.d that is deleted."""
    data = cluster.node("postgres").data
    put(cluster, "pg_hba.conf", TRUST)
    cluster.account.directory(data / "conf.d", 0o700)
    put(cluster, "conf.d/removed.conf", "work_mem = '1MB'\n")
    with cluster.node("postgres").configuration.open("a") as file:
        file.write(f"hba_file = '{data}/pg_hba.conf'\ninclude_dir '{data}/conf.d'\n")
    restart(cluster)
    cluster.sql("postgres", "CREATE TABLE accounts AS SELECT 1 AS id")
    backup_cluster.fn(NAME)
    put(cluster, "pg_hba.conf", SCRAM)
    (data / "conf.d/removed.conf").unlink()
    put(cluster, "site.conf", "cluster_name = 'site'\n")
    put(cluster, "conf.d/more.conf", "include '../site.conf'\n")
    cluster.sql("postgres", "ALTER SYSTEM SET maintenance_work_mem = '77MB'")
    restart(cluster)
    cluster.sql("postgres", "INSERT INTO accounts VALUES (2)")
    return cluster


def put(cluster: Cluster, name: str, text: str) -> None:
    write(cluster.node("postgres").data / name, text, 0o600, cluster.account)


def restart(cluster: Cluster) -> None:
    cluster.stop("postgres")
    cluster.start("postgres")


def require_kept(cluster: Cluster) -> None:
    """The settings in use are those of before the restore, and nobody logs in without a password."""
    settings = [cluster.sql("postgres", f"SHOW {name}")[0][0] for name in ("cluster_name", "maintenance_work_mem")]
    assert settings == ["site", "77MB"]
    assert cluster.sql("postgres", "SHOW work_mem") != [("1MB",)], "a deleted file does not return"
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(host="127.0.0.1", port=cluster.node("postgres").port, user="postgres", dbname="postgres")
    assert not list(Path(cluster.node("postgres").data.parent).glob("*.configuration.json"))


def test_every_file_that_the_live_configuration_uses_stays(edited: Cluster) -> None:
    report = restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert report.status is Status.WARN, report.sentence()
    assert edited.sql("postgres", "SELECT id FROM accounts ORDER BY id") == [(1,), (2,)]
    require_kept(edited)


def test_a_run_after_one_that_was_killed_between_the_renames_uses_the_noted_configuration(edited: Cluster) -> None:
    words = ("--by", "latest", "--target", "")
    killed = launch(0, *words, OPS_FAILPOINT="cluster: between renames")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    (note,) = edited.node("postgres").data.parent.glob("*.configuration.json")
    assert note.stat().st_mode & 0o777 == 0o600
    again = launch(0, *words)
    assert again.returncode == 0, again.stderr[-2000:]
    require_kept(edited)


def test_a_rejoin_after_a_killed_one_uses_the_configuration_of_the_server_that_rejoins(edited: Cluster) -> None:
    """The other server trusts everybody, and has another file in conf.d."""
    other = edited.node("standby").data
    write(other / "pg_hba.conf", TRUST, 0o600, edited.account)
    edited.account.directory(other / "conf.d", 0o700)
    write(other / "conf.d/removed.conf", "work_mem = '1MB'\n", 0o600, edited.account)
    edited.crash("postgres")
    fail_over("unplanned")
    edited.sql("standby", "ALTER SYSTEM SET maintenance_work_mem = '1MB'")
    killed = process("rejoin", "base_backup", OPS_FAILPOINT="rejoin: old one aside")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    again = process("rejoin", "base_backup")
    assert again.returncode == 0, again.stderr[-2000:]
    assert edited.is_standby("postgres")
    require_kept(edited)


def test_a_configuration_that_does_not_start_is_found_before_anything_is_replaced(edited: Cluster) -> None:
    """In the plan, as far as the running server or `postgres -C` shows it; otherwise by the start of the copy."""
    data = edited.node("postgres").data
    before, running = data.stat().st_ino, edited.supervisor.services()["postgresql"].pid
    put(edited, "site.conf", "shared_buffers = 'nonsense'\n")
    with pytest.raises(RunbookFailed, match="configuration of the server.*contains errors"):
        restore_to_point.fn(NAME, by="latest")
    put(edited, "site.conf", "")
    put(edited, "pg_hba.conf", "nonsense\n")
    with pytest.raises(RunbookFailed, match=r"configuration of the server.*pg_hba\.conf line 1"):
        restore_to_point.fn(NAME, by="latest")
    assert edited.supervisor.services()["postgresql"].pid == running, "neither stopped nor restarted"
    edited.crash("postgres")
    with pytest.raises(OpsError, match=r"does not start with the live configuration: .*pg_hba\.conf"):
        restore_to_point.fn(NAME, by="latest", confirm=NAME)
    assert data.stat().st_ino == before
