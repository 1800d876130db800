"""What the weekly clean-ups do when a schedule launches them: a plan, until the environment's TOML names them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.flow_engine import run_flow_sync
from prefect.states import Pending

from blocks.config import toml
from blocks.environment import Environment
from flows.database.backup import prune_backups
from flows.logs.cleaning import clean_logs
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue, manifest
from tasks.backups.manifest import Manifest
from tasks.stores.directory import DirectoryStore

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "unattended-trial"
TOML = """
name = "{name}"
reports = "{base}/reports"
unattended = {unattended}
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[backups]
postgres = "{base}/b/postgresql"
redis = "{base}/b/redis"
files = "{base}/b/files"
cluster = "{base}/b/cluster"
wal = "{base}/b/wal"
spool = "{base}/spool"
keep = {{ hours = 24, daily = 0, weekly = 0, monthly = 0 }}
[logs]
app = "{base}/log/app.log"
audit = "{base}/log/audit.log"
backup = "{base}/log/db_backup.log"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Environment]:
    """Describes the environment with what may run unattended; an old log and an old backup are there."""
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    (tmp_path / "log").mkdir()
    for name, days in (("app.log", 0), ("app.log.9", 40)):
        (tmp_path / "log" / name).write_text("{}\n")
        os.utime(tmp_path / "log" / name, (datetime.now(UTC).timestamp() - 86400 * days,) * 2)
    for days in (1, 2, 3, 40):
        taken = datetime.now(UTC) - timedelta(days=days)
        directory = tmp_path / "b" / "files" / f"app_{taken:%Y%m%d_%H%M%S}"
        directory.mkdir(parents=True)
        manifest.write(
            directory,
            Manifest(
                kind="files",
                name=directory.name,
                environment=NAME,
                taken=taken,
                seconds=1.0,
                host="h",
                tool="t",
                files={},
                content={},
            ),
        )
        catalogue.mark_verified.work(DirectoryStore(directory.parent), directory.name, {"by": "test"})

    def write(*unattended: str) -> Environment:
        (tmp_path / "trial.toml").write_text(TOML.format(name=NAME, base=tmp_path, unattended=list(unattended)))
        return toml.environment(NAME)

    return write


@contextlib.contextmanager
def scheduled(flow: Flow[..., Report]) -> Iterator[list[FlowRun]]:
    """Runs that the server's own scheduler made, none of them begun."""
    schedule = CronSchedule(cron="*/10 * * * *", timezone="Asia/Tokyo")
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(flow), NAME, schedules=[{"schedule": schedule, "active": True}]
        )
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))

        def runs() -> list[FlowRun]:
            found = client.read_flow_runs(deployment_filter=mine)
            return found if len(found) > 1 else []

        try:
            yield until(runs, what="the schedule's runs", seconds=300)
        finally:
            client.delete_deployment(deployment)


def launch(flow: Flow[..., Report], run: FlowRun, parameters: Mapping[str, str]) -> Report:
    """In this process, now."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Pending(), force=True)
    report = run_flow_sync(flow, flow_run=run, parameters={"environment": NAME, **parameters})
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize(
    ("flow", "parameters", "old"),
    [(clean_logs, {}, "log/app.log.9"), (prune_backups, {"kind": "files"}, "b/files/app_*")],
    ids=["clean-logs", "prune-backups"],
)
def test_a_clean_up_is_a_plan_until_the_environment_names_it(
    place: Callable[..., Environment], tmp_path: Path, flow: Flow[..., Report], parameters: dict[str, str], old: str
) -> None:
    before = sorted(tmp_path.glob(old))
    with scheduled(flow) as runs:
        with place("renew-certificates").stands_in():
            planned = launch(flow, runs[0], parameters)
        assert planned.status is Status.PLANNED, planned.sentence()
        assert len(planned.plan_steps) == 1
        assert sorted(tmp_path.glob(old)) == before
        with place("renew-certificates", flow.name).stands_in():
            assert flow(NAME, **parameters).status is Status.PLANNED, "somebody who launches it gets the plan"
            done = launch(flow, runs[1], parameters)
    assert done.status in (Status.OK, Status.WARN), done.sentence()
    assert "unattended" in done.facts
    assert len(list(tmp_path.glob(old))) == len(before) - 1, "the old one, and nothing else"
    assert (tmp_path / "log" / "app.log").exists()
