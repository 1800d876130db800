"""backup_database: a dump and a manifest of one snapshot, published whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.backups import catalogue, manifest
from tasks.host import disk
from tasks.postgres.restore.staged_copy import content_in
from tasks.stores.directory import DirectoryStore
from tests.database.conftest import NAME, Trial
from tests.fixtures import forked
from tests.fixtures.servers import PATIENT

ROOT = Path(__file__).resolve().parents[3]


def newest(trial: Trial) -> catalogue.Backup:
    return catalogue.open_backup(
        DirectoryStore(trial.store), catalogue.names(DirectoryStore(trial.store), "postgres")[-1]
    )


def run(call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A flow in a process of its own, without a Prefect server."""
    code = PATIENT + "import importlib,sys\nmodule,name=sys.argv[1].rsplit('.',1)\n"
    code += "getattr(importlib.import_module(module),name).fn(**eval(sys.argv[2]))\n"
    flow, _, arguments = call.partition(" ")
    words = ["-c", code, flow, arguments or f"dict(environment={NAME!r})"]
    return forked.run(words, {**os.environ, **variables}, timeout=600)


def test_backup_holds_what_the_database_holds(trial: Trial) -> None:
    report = backup_database.fn(NAME)
    assert report.status in (Status.OK, Status.WARN)
    backup = newest(trial)
    assert manifest.damage(backup.path, backup.manifest.files) == []
    content = content_in(backup)
    assert content.tables["public.people"].rows == 2000
    assert content.tables['public."Empty Table"'].rows == 0
    assert content.tables["public.by_mood"].rows == 300  # the leaves of a hash-partitioned table, summed
    assert content.tables["large objects"].rows == 1
    assert content.sequences['public."Ticket Numbers"'].last == 1000
    assert content.revision == "0004"
    assert content.properties.comment == "面接"
    assert ("grc_user", "work_mem", "8MB") in content.properties.settings
    assert (backup.path / "globals.sql").read_text().count("PASSWORD 'SCRAM") == 0


def test_rows_are_counted_despite_row_security(trial: Trial) -> None:
    """250 of 1,000 rows were counted without an error where the role had no BYPASSRLS."""
    trial.sql("ALTER TABLE people FORCE ROW LEVEL SECURITY")
    backup_database.fn(NAME)
    assert content_in(newest(trial)).tables["public.people"].rows == 2000


def test_login_without_bypassrls_is_refused(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text(path.read_text().replace("[services]", 'admin_user = "grc_user"\n[services]'))
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", os.environ["TRIAL_PASSWORD"])
    with pytest.raises(RunbookFailed, match="BYPASSRLS"):
        backup_database.fn(NAME)
    assert catalogue.names(DirectoryStore(trial.store), "postgres") == []


def test_truncate_between_snapshot_and_dump_waits(trial: Trial, tmp_path: Path) -> None:
    """The tables are locked before the snapshot is exported: a TRUNCATE comes after the backup, never into it."""
    ready = tmp_path / "reached"
    code = f"{PATIENT}from flows.database.backup import backup_database; backup_database.fn({NAME!r})"
    child = forked.launch(
        ["-c", code], {**os.environ, "OPS_FAILPOINT": "dump: snapshot exported:pause", "OPS_FAILPOINT_LOG": str(ready)}
    )
    until(lambda: ready.exists() and "dump: snapshot exported" in ready.read_text(), what="the snapshot", seconds=600)
    truncating = threading.Thread(target=lambda: trial.sql("TRUNCATE answers"))
    truncating.start()
    until(
        lambda: trial.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'TRUNCATE'"),
        what="TRUNCATE waiting for the dump's lock",
        seconds=120,
    )
    child.kill()  # the exporter goes, TRUNCATE comes through: had it not waited, it would have come before the dump
    child.wait()
    truncating.join(120)
    assert not truncating.is_alive()


def test_a_truncate_that_waits_is_let_through(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """pg_dump's first process asks for its locks after the exporter has them, and stands behind who came between."""
    truncating = threading.Thread(target=lambda: trial.sql("TRUNCATE answers"))

    def come_between(point: str) -> None:
        if point == "dump: snapshot exported" and not truncating.ident:
            truncating.start()
            until(
                lambda: trial.sql(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'TRUNCATE'"
                ),
                what="TRUNCATE waiting for the dump's lock",
                seconds=120,
            )

    monkeypatch.setattr("tasks.postgres.dump.dump.failpoint", come_between)
    report = backup_database.fn(NAME, jobs=1)
    truncating.join(120)
    assert report.status in (Status.OK, Status.WARN)
    assert content_in(newest(trial)).tables["public.answers_rest"].rows == 0, "it came before the second dump"


def test_killed_backup_is_never_offered_and_cleaned_up(trial: Trial, tmp_path: Path) -> None:
    log = tmp_path / "points"
    assert run("flows.database.backup.backup_database", OPS_FAILPOINT_LOG=str(log)).returncode == 0
    whole = catalogue.names(DirectoryStore(trial.store), "postgres")
    points = list(dict.fromkeys(log.read_text().splitlines()))
    assert "dump: snapshot exported" in points
    assert len(points) > 8
    published = points.index("after publish")
    for point in points[points.index("before dump_globals") : published]:
        done = run("flows.database.backup.backup_database", OPS_FAILPOINT=point)
        assert done.returncode == -9, point
        assert catalogue.names(DirectoryStore(trial.store), "postgres") == whole, f"offered after a kill at {point}"
    for point in points[published:]:
        assert run("flows.database.backup.backup_database", OPS_FAILPOINT=point).returncode == -9, point
        assert catalogue.names(DirectoryStore(trial.store), "postgres")[:-1] == whole, (
            f"not there after a kill at {point}"
        )
        assert manifest.damage(newest(trial).path, newest(trial).manifest.files) == []
        whole = catalogue.names(DirectoryStore(trial.store), "postgres")
    assert run("flows.database.backup.backup_database", OPS_FAILPOINT="dump: snapshot exported").returncode == -9
    told = backup_database.fn(NAME).facts["an earlier run died"]
    assert "nothing live was changed; left behind: unfinished backup" in told
    assert "(the next backup of this kind deletes it)" in told
    assert not list(trial.store.glob(".partial-*"))
    assert len(catalogue.names(DirectoryStore(trial.store), "postgres")) == len(whole) + 1
    assert not list(trial.reports.glob(".unfinished-*"))


def test_full_disk_is_refused_before_anything_is_written(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def full(path: str | Path) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 10  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(disk.os, "statvfs", full)
    with pytest.raises(RunbookFailed, match=r"free space in the store: .*Next: free .* at "):
        backup_database.fn(NAME)
    assert not list(trial.store.glob("*"))


def test_no_such_database(trial: Trial) -> None:
    trial.server.drop_database(trial.database)
    with pytest.raises(RunbookFailed, match="does not exist. Next: correct the database's name"):
        backup_database.fn(NAME)


def test_wrong_password_is_one_clear_sentence(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIAL_ADMIN_PASSWORD", "geheim-4711")
    with pytest.raises(OpsError, match="refuses the password of role postgres") as caught:
        backup_database.fn(NAME)
    assert "geheim" not in str(caught.value)
    report = json.loads(max(trial.reports.glob("*.json")).read_text())
    assert report["status"] == "CRITICAL"
    assert "geheim" not in json.dumps(report)


def test_server_down_is_said(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text(path.read_text().replace(f"port = {trial.server.port}", "port = 1"))
    monkeypatch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [0.0])
    with pytest.raises(RunbookFailed, match="does not answer"):
        backup_database.fn(NAME)


def test_unknown_environment_names_the_known_ones() -> None:
    with pytest.raises(OpsError, match="there is no environment “nowhere” — choose one of .*production"):
        backup_database.fn("nowhere")
