"""An upgrade of Prefect, from one of a year before: rehearsed, refused where it cannot be, carried out, looked at again.

The older Prefect is installed from its own lock (requirements-older-prefect.txt) and serves as production's does: API
and background services apart, on PostgreSQL and Redis, with a password. What is in it, its own client has put there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import prefect
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.variables import Variable

from flows.infrastructure.prefect.server import backup_prefect, restore_prefect
from lab.state.base import CHECKOUT
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.prefect.server import revisions
from tests.infrastructure.installation import NAME, Installation, running_installation

pytestmark = [pytest.mark.system, pytest.mark.contrib]  # packages from an index; Prefect needs pg_trgm
LOCK = Path(__file__).with_name("requirements-older-prefect.txt")
OLDER = "3.4.25"
TOKEN = "s3cret-of-a-block-4725"
FILL = """
import datetime, os
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import Scheduled
from prefect.variables import Variable

@flow
def errand(number: int = 0) -> int:
    return number

Secret(value=os.environ["TOKEN"]).save("deploy-token")
Variable.set("region", "tokyo")
for number in range(3):
    errand(number)
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="hosts", type="process"))
    for name in ("nightly", "by-hand"):
        made = client.create_deployment(client.create_flow(errand), name, work_pool_name="hosts", entrypoint="a.py:errand")
    client.create_deployment_schedules(made, [(CronSchedule(cron="0 3 * * *", timezone="Asia/Tokyo"), True)])
    tomorrow = Scheduled(scheduled_time=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1))
    client.create_flow_run_from_deployment(made, name="tomorrow", state=tomorrow)
    client.create_automation(AutomationCore(
        name="kept", actions=[RunDeployment(deployment_id=made, source="selected")],
        trigger=EventTrigger(expect={"ops.nothing"}, posture=Posture.Reactive, threshold=1)))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An older Prefect that serves, and has something to lose."""
    directory = tmp_path_factory.mktemp("older") / "venv"
    uv = [Path(sys.prefix) / "tools" / "bin" / "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, directory], check=True)
    python = directory / "bin" / "python"
    subprocess.run([*uv, "pip", "sync", "--python", python, "--require-hashes", LOCK], check=True)
    with running_installation(python) as made, made.client():
        variables = {**os.environ, "TOKEN": TOKEN, "PREFECT_HOME": str(made.base / "home")}
        subprocess.run([python, "-c", FILL], cwd=made.base, env=variables, check=True)
        yield made


@dataclass(frozen=True)
class Told:
    """What the rehearsal printed, and its report's facts and findings."""

    said: str
    facts: Mapping[str, str]
    findings: Mapping[str, str]


def rehearse() -> Told:
    """As an operator launches it with the new version installed."""
    argv = [sys.executable, "-m", "flows.infrastructure.prefect.server", "upgrade", "--environment", NAME]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    filed = json.loads(Path(done.stdout.rpartition("report: ")[2].strip()).read_text())
    return Told(done.stdout, filed["facts"], {one["name"]: one["value"] for one in filed["findings"]})


def test_from_an_older_prefect_to_this_one(older: Installation) -> None:
    assert backup_prefect.fn(NAME).facts["Prefect"].startswith(f"{OLDER}; 2 deployments, ")
    told = rehearse()
    assert f"migrates to Prefect {prefect.__version__} and is served by it; every row is there" in told.said
    assert told.facts["live"].startswith(f"Prefect {OLDER}, ")
    assert told.findings["revision of the migrated copy"] == revisions()[0]
    with pytest.raises(RunbookFailed, match=f"install the Prefect that took it .*{OLDER}"):
        restore_prefect.fn(NAME)
    assert older.is_ready(), "nothing live was touched"

    for name in ("prefect-services", "prefect-api"):  # as the report's steps say
        older.supervisor.stop(name)
    last = backup_prefect.fn(NAME)
    assert last.status is Status.WARN, "its API is away"
    argv = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(argv, env={**os.environ, **older.variables()}, check=True)
    older.supervisor.shutdown()
    older.python = Path(sys.executable)
    older.launch()

    told = rehearse()
    assert told.facts["taken with"] != told.facts["upgrade to"], "of the last backup by the older one"
    assert told.facts["live"] == f"Prefect {prefect.__version__}, revision {revisions()[0]}"
    assert told.findings["content of the upgraded API"] == "everything in the backup"
    assert Secret.load("deploy-token").get() == TOKEN  # type: ignore[union-attr]
    with get_client(sync_client=True) as client:
        assert {one.name for one in client.read_deployments()} == {"nightly", "by-hand"}
        (kept,) = client.read_automations_by_name("kept")
        assert kept.enabled
        states = sorted(str(run.state_name) for run in client.read_flow_runs() if not run.auto_scheduled)
        assert states == ["Completed", "Completed", "Completed", "Scheduled"]
    assert str(Variable.get("region")) == "tokyo"
    assert backup_prefect.fn(NAME).facts["Prefect"].startswith(f"{prefect.__version__}; 2 deployments, ")
    assert "nothing to upgrade" in rehearse().said
