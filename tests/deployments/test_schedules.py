"""What is scheduled follows the environment's TOML: what it has no more is not launched any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule

from blocks.environment import Environment
from deployments import deploy

NAME = "schedules-trial"
DAILY, COPIES, BY_HAND = f"{NAME}-redis", f"{NAME}-copies-redis", NAME
TOML = """
name = "{name}"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[backups]
redis = "{base}/backups"
spool = "{base}/spool"
"""
SECOND_PLACE = """
[copies]
redis = "{base}/copies"
spool = "{base}/spool"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Iterator[Path]:
    """The environment's TOML. Of prefect.yaml only what this test looks at is deployed, into a pool of its own."""
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    whole = deploy.chosen

    def few(
        content: Mapping[str, Any], environment: Environment, kinds: Mapping[str, str], **more: bool
    ) -> dict[str, Any]:
        described = whole(content, environment, kinds, **more)
        return {**described, "deployments": [entry for entry in described["deployments"] if looked_at(entry)]}

    monkeypatch.setattr(deploy, "chosen", few)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=NAME, type="process"))
        try:
            yield tmp_path / "trial.toml"
        finally:
            for one in deployed().values():
                client.delete_deployment(one.id)
            client.delete_work_pool(NAME)


def looked_at(entry: Mapping[str, Any]) -> bool:
    """The two that are pruned by a schedule, and a runbook that has none."""
    flow, suffix = entry["entrypoint"].rpartition(".")[2], entry["name"].partition("}}")[2]
    return (flow, suffix) in {
        ("prune_backups", "-redis"),
        ("prune_backups", "-copies-redis"),
        ("check_redis_memory", ""),
    }


def deployed() -> dict[str, DeploymentResponse]:
    """By their names."""
    with get_client(sync_client=True) as client:
        found = client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[NAME])))
    return {one.name: one for one in found}


def scheduled() -> set[str]:
    return {name for name, one in deployed().items() if one.schedules}


def test_a_schedule_goes_with_what_it_is_for(file: Path) -> None:
    text, second = (one.format(name=NAME, base=file.parent) for one in (TOML, SECOND_PLACE))
    file.write_text(text + second)
    deploy.deploy(NAME)
    assert set(deployed()) == {DAILY, COPIES, BY_HAND}
    assert scheduled() == {DAILY, COPIES}
    with get_client(sync_client=True) as client:
        client.create_deployment_schedules(deployed()[BY_HAND].id, [(CronSchedule(cron="0 6 * * *"), True)])
    file.write_text(text)
    deploy.deploy(NAME)
    assert scheduled() == {DAILY, BY_HAND}, "what somebody added by hand stays"
    file.write_text(text + second)
    deploy.deploy(NAME)
    assert scheduled() == {DAILY, COPIES, BY_HAND}
