"""What costs money and does nothing: containers, leftovers of Docker, cloud resources (§4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Annotated, TypeVar

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.infrastructure.cloud_findings import (
    judge_addresses,
    judge_buckets,
    judge_costs,
    judge_instances,
    judge_volumes,
)
from flows.infrastructure.resource_findings import judge_size, tell_leftovers
from runbook.errors import OpsError
from runbook.form import read_forms
from runbook.report import Report
from runbook.run import runbook
from tasks.cloud import aws
from tasks.docker.inventory import read_inventory
from tasks.docker.usage import read_use

T = TypeVar("T")


@flow(name="review-resources", flow_run_name="review-resources {environment}")
def review_resources(environment: str, samples: Annotated[int, Field(ge=2, le=100)] = 10) -> Report:
    """コスト最適化: リソースの棚卸し (§4.2)

    Looks at what is paid for: containers that do nothing, or take far less than their limits, by `samples` samples of
    a second or two each; everything on the Docker Engine that nobody uses, with its bytes and their cost; and, where
    the environment has [cloud], EC2 instances that are stopped or idle, disks and addresses that nothing is attached
    to, sizes of buckets, and the bill by service. Run it monthly, at a busy hour.

    It changes nothing. What cannot be read is told, and the rest goes on. A container that was idle for these seconds
    may be busy at night: look at its purpose before it goes.

    Args:
        environment: 対象の環境
        samples: コンテナの測定回数 (1回1〜2秒)
    """
    env = Environment.find(environment)
    with runbook("Review resources", env) as report:
        if not env.has("docker") and not env.has("cloud"):
            raise OpsError("the environment has neither [docker] nor [cloud]", "add what it pays for to its TOML")
        if env.has("docker"):
            _part(report, "Docker", lambda: review_docker(report, env, samples))
        if env.has("cloud"):
            review_cloud(report, env)
        bad = sum(finding.hint != "" for finding in report.findings)
        report.outcome = f"{bad} things to look at" if bad else "nothing is paid for that nobody uses"
    return report


def _part(report: Report, what: str, work: Callable[[], T]) -> T | None:
    """One part; what cannot be read is no reason to leave out the others."""
    try:
        return work()
    except OpsError as error:
        report.warn(f"{what} could be read", error.hint or "look at it", value=error.message)
        return None


def review_docker(report: Report, env: Environment, samples: int) -> None:
    """Containers that do nothing, and what nobody uses.

    Raises:
        OpsError: the engine does not answer.
    """
    found = read_inventory(env.docker.host)
    taken = [read_use(env.docker.host, found.containers) for _ in range(samples)]
    judge_size(report, found, taken)
    tell_leftovers(report, found, env.cloud if env.has("cloud") else None)
    given = {"environment": env.name, "volumes": [one.name for one in found.dangling_volumes()]}
    report.fact("what frees it", read_forms([env.name]).link("clean-docker", env.name, given))


def review_cloud(report: Report, env: Environment) -> Mapping[str, float]:
    """Part by part; what cannot be read is told. Returns the bill by month."""
    cloud = env.cloud
    report.fact("prices", cloud.prices_from or "nobody wrote where they are from: [cloud] prices_from")
    _part(report, "EC2 instances", lambda: judge_instances(report, aws.read_instances(cloud)))
    _part(report, "unattached disks", lambda: judge_volumes(report, cloud, aws.find_unattached_volumes(cloud)))
    _part(report, "addresses", lambda: judge_addresses(report, cloud, aws.find_unattached_addresses(cloud)))
    _part(report, "buckets", lambda: judge_buckets(report, aws.read_buckets(cloud)))
    return _part(report, "the bill", lambda: judge_costs(report, aws.read_costs(cloud, date.today()))) or {}
