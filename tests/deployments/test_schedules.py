"""What is deployed and scheduled follows the environment's TOML: what it has no more is neither."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.workers.process import ProcessWorker

from blocks.config import toml
from blocks.environment import Environment
from deployments import deploy, start_page
from runbook.errors import OpsError

NAME = "schedules-trial"
DAILY, COPIES, HOURLY, BY_HAND = f"{NAME}-redis", f"{NAME}-copies-redis", f"{NAME}!", NAME
LOOKED_AT = {
    ("prune_backups", "-redis"),
    ("prune_backups", "-copies-redis"),
    ("take_due_backups", ""),
    ("clear_cache", ""),
}
TOML = """
name = "{name}"
timezone = "{zone}"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[postgres]
database = "d"
user = "u"
password_env = "OPS_TRIAL_PASSWORD"
admin_password_env = "OPS_TRIAL_PASSWORD"
[backups]
redis = "{base}/backups"
spool = "{base}/spool"
"""
REDIS = """
[redis]
port = 1
"""
SECOND_PLACE = """
[copies]
postgres = "{base}/copies/postgresql"
redis = "{base}/copies/redis"
files = "{base}/copies/files"
cluster = "{base}/copies/cluster"
wal = "{base}/copies/wal"
spool = "{base}/spool"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Iterator[Path]:
    """The environment's TOML. Of prefect.yaml only what this test looks at is deployed, into a pool of its own."""
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    monkeypatch.setenv("OPS_TRIAL_PASSWORD", "trial")
    whole = deploy.chosen

    def few(
        content: Mapping[str, Any], environment: Environment, kinds: Mapping[str, str], **more: Any
    ) -> dict[str, Any]:
        described = whole(content, environment, kinds, **more)
        return {**described, "deployments": [entry for entry in described["deployments"] if looked_at(entry)]}

    monkeypatch.setattr(deploy, "chosen", few)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=NAME, type="process"), overwrite=True)
        try:
            yield tmp_path / "trial.toml"
        finally:
            for one in deployed().values():
                client.delete_deployment(one.id)
            client.delete_work_pool(NAME)


def looked_at(entry: Mapping[str, Any]) -> bool:
    """Three that have a schedule, one of them an hourly one, and a runbook that has none."""
    return (entry["entrypoint"].rpartition(".")[2], entry["name"].partition("}}")[2]) in LOOKED_AT


def deployed() -> dict[str, DeploymentResponse]:
    """By their names; that of the hourly one with a mark."""
    with get_client(sync_client=True) as client:
        found = client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[NAME])))
    return {one.name + "!" * str(one.entrypoint).endswith("take_due_backups"): one for one in found}


def scheduled() -> set[str]:
    return {name for name, one in deployed().items() if one.schedules}


def zones() -> dict[str, set[str | None]]:
    return {
        name: {one.schedule.timezone for one in found.schedules if isinstance(one.schedule, CronSchedule)}
        for name, found in deployed().items()
        if found.schedules
    }


def paused() -> set[str]:
    return {name for name, one in deployed().items() if one.paused}


def test_what_is_deployed_and_scheduled_follows_the_toml(file: Path) -> None:
    def described(*more: str, zone: str = "Asia/Tokyo") -> None:
        file.write_text("".join((TOML, *more)).format(name=NAME, base=file.parent, zone=zone))

    described(SECOND_PLACE)
    file.write_text(file.read_text().partition("[postgres]")[0])
    with pytest.raises(OpsError, match=r"neither \[postgres\] nor \[redis\]"):
        deploy.deploy(NAME)
    described(REDIS, SECOND_PLACE)
    deploy.deploy(NAME, paused=True)
    assert set(deployed()) == {DAILY, COPIES, HOURLY, BY_HAND}
    assert scheduled() == paused() == {DAILY, COPIES, HOURLY}
    with get_client(sync_client=True) as client:
        client.create_deployment_schedules(deployed()[BY_HAND].id, [(CronSchedule(cron="0 6 * * *"), True)])
    described(REDIS, SECOND_PLACE, zone="America/New_York")
    assert "3 of them scheduled in America/New_York" in deploy.deploy(NAME)
    assert paused() == set(), "what was deployed paused begins with the next deployment"
    assert zones() == {DAILY: {"America/New_York"}, COPIES: {"America/New_York"}, HOURLY: {"UTC"}, BY_HAND: {None}}
    with get_client(sync_client=True) as client:
        client.pause_deployment(deployed()[DAILY].id)
        old = {"name": f"9 No longer a symptom ({NAME})", "tags": [start_page.TAG], "work_pool_name": NAME}
        entrypoint, given = "flows.redis.cache.clear_cache", {"environment": NAME}
        flow_id = deployed()[BY_HAND].flow_id
        client.create_deployment(flow_id=flow_id, entrypoint=entrypoint, parameters=given, **old)
    assert set(start_page.read_symptom_deployments(NAME)) == {f"clear-cache/{old['name']}"}
    described(REDIS)
    assert "deleted 1 of parts that it has no more" in deploy.deploy(NAME)
    assert scheduled() == {DAILY, HOURLY, BY_HAND}, "what somebody added by hand stays"
    assert paused() == {DAILY}, "what somebody paused stays paused"
    assert start_page.read_symptom_deployments(NAME) == {}, "what is not in the table any more is deleted"


def test_a_process_pool_begins_runs_at_once_unless_it_has_a_command(file: Path) -> None:
    """Also one that is made by the deployment, and one whose worker was never started."""
    pools = f'[pools]\nredis = "{NAME}-redis"\ndatabase = "{NAME}-own"\napplication = "{NAME}-docker"\n'
    file.write_text(TOML.format(name=NAME, zone="Asia/Tokyo", base=file.parent) + REDIS + pools)
    plain = ProcessWorker.get_default_base_job_template()
    properties = plain["variables"]["properties"]
    named = {**properties, "command": {**properties["command"], "default": "nice python -m prefect.engine"}}
    own = {**plain, "variables": {**plain["variables"], "properties": named}}
    with get_client(sync_client=True) as client:
        client.delete_work_pool(NAME)
        for kind, name, template in (("process", "redis", {}), ("process", "own", own), ("docker", "docker", plain)):
            wanted = WorkPoolCreate(name=f"{NAME}-{name}", type=kind, base_job_template=template)
            client.create_work_pool(wanted, overwrite=True)
        try:
            deploy.prepare_pools(toml.environment(NAME))
            found = {name: client.read_work_pool(NAME + name) for name in ("", "-redis", "-own", "-docker")}
        finally:
            for name in ("-redis", "-own", "-docker"):
                client.delete_work_pool(NAME + name)
    assert found["-redis"].base_job_template == {}, "its worker makes one when it starts"
    commands = {
        name: found[name].base_job_template["variables"]["properties"]["command"]["default"]
        for name in ("", "-own", "-docker")
    }
    assert commands == {"": deploy.AT_ONCE, "-own": "nice python -m prefect.engine", "-docker": None}


def test_prefect_s_own_command_deploys_as_well(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As prefect.yaml's head says: what it names, in the zone that it names."""
    monkeypatch.setenv("OPS_ROOT", str(deploy.ROOT))
    content = yaml.safe_load((deploy.ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    few = {**content, "deployments": [entry for entry in content["deployments"] if looked_at(entry)][:1]}
    (file.parent / "prefect.yaml").write_text(yaml.safe_dump(few, allow_unicode=True))
    argv = (
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        file.parent / "prefect.yaml",
    )
    done = subprocess.run(argv, cwd=deploy.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert zones() == {DAILY: {"Asia/Tokyo"}}
