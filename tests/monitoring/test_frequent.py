"""The watcher's frequent checks: Prefect shows a run where something changed, and people are called as fast as before."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

from deployments import register
from flows.application.files import backup_files
from flows.monitoring import frequent
from flows.monitoring.frequent import FrequentChecks
from flows.recovery.objectives.check import check_recovery_objectives
from flows.recovery.objectives.due import take_due_backups
from lab.processes import exclusive
from lab.state.base import base_directory
from tests.fixtures.receivers import http_receiver, smtp_receiver
from tests.monitoring.duty import Duty, prepare

MORE = """
[application]
directory = "{base}/opt/app"
[backups]
files = "{base}/backups/files"
[monitoring]
watcher = true
"""
NOW = (0.0, 0.0, 0.0)


class Scene:
    """An environment of a name that no other test has, whose deployments no worker runs."""

    def __init__(self, client: SyncPrefectClient, duty: Duty) -> None:
        self.client, self.duty, self.lines, self.answers = client, duty, list[str](), True
        self.checks = FrequentChecks(lambda: self.answers, self.lines.append)
        self.deployments = {
            one.name: client.create_deployment(client.create_flow(one), duty.name)
            for one in (check_recovery_objectives, take_due_backups)
        }

    def describe(self, minutes: tuple[float, float, float] = (0, 15, 30)) -> None:
        self.duty.describe(minutes=minutes)
        with (self.duty.base / "trial.toml").open("a", encoding="utf-8") as file:
            file.write(MORE.format(base=self.duty.base))
        with exclusive(base_directory() / ".deploy.lock"):
            register.register(self.duty.name)

    def take(self) -> None:
        assert self.checks.take(self.duty.env), self.lines

    def launched(self, flow: str) -> int:
        wanted = DeploymentFilter(id=DeploymentFilterId(any_=[self.deployments[flow]]))
        return len(self.client.read_flow_runs(deployment_filter=wanted))


@pytest.fixture
def scene(prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    (tmp_path / "opt" / "app").mkdir(parents=True)
    (tmp_path / "opt" / "app" / "settings").write_text("x")
    with http_receiver() as web, smtp_receiver() as mail, get_client(sync_client=True) as client:
        found = Scene(client, prepare(tmp_path, web, mail, monkeypatch, named=f"t{uuid.uuid4().hex[:12]}"))
        found.describe()
        yield found


def test_a_run_appears_where_something_changed_and_whoever_is_due_is_called(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives, backups, name = "check-recovery-objectives", "take-due-backups", scene.duty.name
    scene.take()
    assert (scene.launched(objectives), scene.launched(backups)) == (1, 1), "no backup is there, one is due"
    assert scene.duty.told == ["oncall"], "the pool has no worker"
    assert f"work pool {name}" in scene.duty.mail.letters[0]["Subject"]

    scene.client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    scene.take()
    assert (scene.launched(objectives), scene.launched(backups)) == (1, 1), "nothing changed"
    assert scene.duty.told == ["oncall"], "called once"

    backup_files.fn(name)
    scene.answers = False
    scene.take()
    assert scene.launched(objectives) == 1, "Prefect did not answer"
    scene.answers = True
    scene.client.send_worker_heartbeat(name, "a worker")
    scene.take()
    assert scene.launched(objectives) == 2, "the change is published as soon as it answers"
    assert scene.launched(backups) == 1, "none is due now"

    scene.describe(NOW)
    scene.take()
    assert scene.duty.told == ["oncall"], "the scheduled run of escalate has a minute"
    monkeypatch.setattr(frequent, "GRACE", timedelta())
    scene.take()
    assert scene.duty.told == ["oncall", "lead", "manager", "executives"], "without a worker"
    scene.take()
    assert len(scene.duty.told) == 4


def test_a_watcher_whose_checks_hang_sends_no_heartbeat(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect escalates the silence; and the hourly run of the check names a watcher that takes no rounds."""
    env = scene.duty.env
    assert scene.checks.is_healthy(env), "it has only begun"
    monkeypatch.setattr(frequent, "is_due", lambda *_: 1 / 0)
    scene.checks.kick(env)
    thread = scene.checks._thread
    assert thread
    thread.join(120)
    assert scene.launched("check-recovery-objectives") == 1, "the other checks were made"
    assert "ZeroDivisionError" in scene.lines[-1]
    assert scene.checks.is_healthy(env)
    monkeypatch.setattr(frequent, "HUNG_SECONDS", 0.0)
    assert not scene.checks.is_healthy(env)
    plain = env.with_parts({"monitoring": env.monitoring.model_copy(update={"watcher": False})})
    assert scene.checks.is_healthy(plain), "Prefect's schedules take the checks"
    report = frequent._report_of(env)
    (found,) = [one for one in report.findings if one.name == "the watcher"]
    assert (found.status, found.value) == ("WARN", "no round in this report folder")
