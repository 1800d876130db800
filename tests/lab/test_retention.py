"""A lab prunes its backups and its WAL by itself, with the runbooks of a real environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml  # type: ignore[import-untyped]

from blocks.config import toml
from deployments.deploy import called
from flows.database.backup import verify_backup
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from lab import lifecycle, retention
from lab.client import Lab
from lab.retention import LabUse
from lab.runs import Run, Runs
from lab.state.base import CHECKOUT
from lab.state.environment import api_url, auth_string, ui_url
from runbook.errors import OpsError
from runbook.report import Status
from tasks.backups import catalogue, manifest
from tasks.stores.store import store_of


@dataclass(frozen=True)
class Recorded(Runs):
    """Runs that end at once; `busy` is what runs beside, by the number of launches before."""

    api: str = ""
    ui: str = ""
    auth: str = ""
    launched: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refused: str = "none"
    busy: dict[int, str] = field(default_factory=dict)
    environment: str = "small"

    def run(self, deployment: str, parameters: Any, *_: Any, **__: Any) -> Run:
        self.launched.append((deployment, dict(parameters)))
        if deployment.startswith(self.refused):
            raise OpsError("it is refused")
        return Run("1", "one", "COMPLETED", "", 1.0, ())

    def call(self, *_: Any) -> Any:
        name = self.busy.get(len(self.launched))
        return [{"name": name, "parameters": {"environment": self.environment}}] if name else []


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> LabUse:
    """A lab of 1 MB over its limit."""
    over = LabUse(13 * 10**9, 10**9)
    monkeypatch.setattr(retention, "read_use", lambda services: over)
    monkeypatch.setattr(lifecycle, "existing", lambda name: (None, None))
    return over


def test_a_lab_is_measured_with_its_second_region_and_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(os.urandom(200 << 10))
    os.link(tmp_path / "a" / "file", tmp_path / "another name")
    assert 200 << 10 <= retention.disk_bytes(tmp_path) < 300 << 10
    assert (LabUse(8 * 10**9, 1).is_over, LabUse(8 * 10**9 + 1, 1).is_over) == (False, True)
    assert (LabUse(12 * 10**9, 10**9).is_over, LabUse(12 * 10**9 + 1, 10**9).is_over) == (False, True)


@pytest.mark.usefixtures("used")
def test_what_is_over_the_limit_is_proven_and_then_pruned() -> None:
    runs, told = Recorded(refused="verify-backup"), list[str]()
    assert retention.look("small", runs, told.append)
    names = [name for name, _ in runs.launched]
    assert names[:2] == ["backup-cluster/small-daily", "verify-backup/small-cluster"]
    assert names.index("replicate-backups/small") < names.index("prune-backups/small") < len(names) - 1
    confirmed = {name for name, parameters in runs.launched if parameters == {"confirm": "small"}}
    assert confirmed == {name for name in names if name.startswith(("prune-backups", "discard-superseded"))}
    assert any("refused" in line for line in told), "one that is refused ends no other"
    assert "uses 13,000 MB of 12,000 MB before the pruning" in told[-1]


def test_below_the_limit_or_beside_a_flow_nothing_is_pruned(used: LabUse, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Recorded(busy={2: "full-restore small"})
    assert not retention.look("small", runs, lambda _: None)
    assert len(runs.launched) == 2, "a recovery that began meanwhile is waited for"
    assert not retention.look("small", Recorded(busy={0: "a drill"}), lambda _: None)
    assert retention.look("small", Recorded(busy={0: "a drill"}, environment="another"), lambda _: None)
    monkeypatch.setattr(retention, "SHARE", used.lab // used.database)
    few = Recorded()
    assert retention.look("small", few, lambda _: None), "nothing is in the way"
    assert not few.launched


def test_every_runbook_that_it_launches_is_deployed_in_a_lab() -> None:
    content = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text(encoding="utf-8"))
    there = {called(entry, "lab") for entry in content["deployments"]}
    assert {name.format("lab") for name in (*retention.PROOF, *retention.PRUNING)} <= there


@pytest.mark.soak  # a dozen runs of a worker
def test_a_labs_wal_is_pruned_as_far_as_a_proven_base_backup_allows(
    deployed: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between two base backups that are older than the hours of `keep`, of which the second is proven."""
    services, control = lifecycle.existing(deployed.name)
    store = store_of(toml.environment(deployed.name), "cluster")
    for hours in (6, 3):
        one = catalogue.open_backup(store, backup_cluster.fn(deployed.name).facts["backup"])
        manifest.write(one.path, one.manifest.model_copy(update={"taken": one.manifest.taken - timedelta(hours=hours)}))
        for _ in range(8):
            with psycopg.connect(services.admin_dsn, autocommit=True) as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS grown (t text)")
                connection.execute("INSERT INTO grown SELECT md5(g::text) FROM generate_series(1, 50000) g")
                connection.execute("SELECT pg_switch_wal()")
    verify_backup.fn(deployed.name, kind="cluster")
    replicate_backups.fn(deployed.name, kind="cluster")
    monkeypatch.setattr(retention, "LEAST_BYTES", 1)
    monkeypatch.setattr(retention, "SHARE", 0)
    runs, told = Runs(api_url(control.state), ui_url(control.state), auth_string(control.state)), list[str]()
    assert retention.look(deployed.name, runs, told.append), told
    # By the reports: of what the receiver still has, the archiver puts some back within ten minutes.
    reports = [json.loads(path.read_text()) for path in services.layout.reports.glob("*-prune-backups.json")]
    assert sum("files of WAL deleted" in report["outcome"] for report in reports) == 2, told
    assert verify_backup.fn(deployed.name, kind="cluster").status in (Status.OK, Status.WARN)
    with psycopg.connect(services.admin_dsn, autocommit=True) as connection:
        connection.execute("DROP TABLE grown")
