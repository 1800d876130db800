"""Resources that cost money and are unused: containers, parts of Docker, cloud resources (§4.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Annotated, TypeVar

from pydantic import Field

from blocks.cloud import Cloud
from blocks.environment import Environment
from flows.infrastructure.images.usage import listed
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.cloud import aws
from tasks.cloud.aws import CPU_DAYS, BucketSize, CloudInstance, Cost, Volume
from tasks.docker.inventory import Inventory, read_inventory
from tasks.docker.usage import ContainerUse, read_use

T = TypeVar("T")


@flow(name="review-resources", flow_run_name=RunName("review-resources {environment}"))
def review_resources(environment: str, samples: Annotated[int, Field(ge=2, le=100)] = 10) -> Report:
    """コスト最適化: リソースの棚卸し (§4.2)

    Lists unused resources:

    - containers that are idle, or use far less than their limits, by `samples` samples of 1 to 2 s each;
    - unused parts of the Docker Engine, with bytes and cost;
    - with [cloud]: stopped or idle EC2 instances, unattached disks and addresses, bucket sizes, the bill by service.

    Run it monthly, at a busy hour. It changes nothing. A part that cannot be read is a WARN; the others are still
    checked. A container that is idle now can be busy at night: find out its purpose before you remove it.

    Args:
        environment: Environment (lab, staging, production …)
        samples: Measurements of the containers (1 to 2 s each)
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
        report.outcome = f"{bad} findings to check" if bad else "no unused resource was found"
    return report


def _part(report: Report, what: str, work: Callable[[], T]) -> T | None:
    """One part of the review; an error is a WARN and does not stop the others."""
    try:
        return work()
    except OpsError as error:
        report.warn(f"not measured: {what}", error.hint or "check its configuration", value=error.message)
        return None


def review_docker(report: Report, env: Environment, samples: int) -> None:
    """Idle containers, and unused parts of the engine.

    Raises:
        OpsError: the engine does not answer.
    """
    found = read_inventory(env.docker.host)
    taken = [read_use(env.docker.host, found.containers) for _ in range(samples)]
    judge_size(report, found, taken)
    judge_unused(report, found, env.cloud if env.has("cloud") else None)


def review_cloud(report: Report, env: Environment) -> Mapping[str, float]:
    """Review the cloud account, part by part. Returns the bill by month."""
    cloud = env.cloud
    report.fact("prices", cloud.prices_from or "source not known: set [cloud] prices_from")
    _part(report, "EC2 instances", lambda: judge_instances(report, aws.read_instances(cloud)))
    _part(report, "unattached disks", lambda: judge_volumes(report, cloud, aws.find_unattached_volumes(cloud)))
    _part(report, "addresses", lambda: judge_addresses(report, cloud, aws.find_unattached_addresses(cloud)))
    _part(report, "buckets", lambda: judge_buckets(report, aws.read_buckets(cloud)))
    return _part(report, "the bill", lambda: judge_costs(report, aws.read_costs(cloud, date.today()))) or {}


IDLE_CPUS = 0.005
SPARE_RATIO = 0.25
LEAST_MEMORY = 64 << 20


def judge_size(report: Report, found: Inventory, taken: Sequence[Mapping[str, ContainerUse]]) -> None:
    """Idle containers, and those with too much memory, by the highest usage of each."""
    rows, idle, spare = [], list[str](), list[str]()
    for one in found.containers:
        uses = [sample[one.name] for sample in taken if one.name in sample]
        if one.stopped or not uses:
            continue
        cpus, memory = max(use.cpus for use in uses), max(use.memory for use in uses)
        if cpus < IDLE_CPUS:
            idle.append(one.name)
        enough = max(2 * memory, LEAST_MEMORY)
        if one.limits.memory and memory < one.limits.memory * SPARE_RATIO and enough < one.limits.memory:
            spare.append(f"{one.name} ({size(memory)} of {size(one.limits.memory)}; {size(enough)} is enough)")
        rows.append(
            (
                one.name,
                len(uses),
                f"{cpus:.3f}",
                f"{one.limits.cpus:g}" if one.limits.cpus else "no limit",
                size(memory),
                size(one.limits.memory) if one.limits.memory else "no limit",
            )
        )
    report.table("Highest usage of containers", ("container", "samples", "CPUs", "limit", "memory", "limit"), rows)
    report.prefer(
        "idle containers",
        not idle,
        "find out their purpose; stop those that are not needed",
        value=listed(idle),
        expected=f"over {IDLE_CPUS:g} processors",
    )
    report.prefer(
        "containers with too much memory",
        not spare,
        "lower their memory under [docker.containers], then deploy-application with recreate",
        value=listed(spare),
    )


def judge_unused(report: Report, found: Inventory, cloud: Cloud | None) -> None:
    """Unused parts of the engine, with their bytes and monthly cost."""
    stopped = [("stopped container", one.name, one.bytes) for one in found.containers if one.stopped]
    images = [("image without a tag", one.name, one.bytes) for one in found.dangling_images()]
    volumes = [("volume", one.name, max(one.bytes, 0)) for one in found.dangling_volumes()]
    networks = [("network", one.name, 0) for one in found.dangling_networks()]
    cache = [("build cache", one.id, one.bytes) for one in found.cache if not one.in_use]
    left = [*stopped, *images, *volumes, *networks, *cache]
    price = cloud.disk_price if cloud else 0.0
    rows = [(kind, name, size(taken), money(taken / 1e9 * price, cloud)) for kind, name, taken in left]
    report.table("Unused parts", ("kind", "name", "bytes", "monthly cost"), rows)
    total = sum(taken for _, _, taken in left)
    report.prefer(
        "unused parts of Docker",
        not left,
        "remove them",
        value=f"{len(left)}, {size(total)}, {money(total / 1e9 * price, cloud)}" if left else "none",
        follow=[Next("clean-docker", parameters={"volumes": [one.name for one in found.dangling_volumes()]})],
    )


def money(amount: float, cloud: Cloud | None) -> str:
    """An amount, or that there is no price."""
    return f"{amount:,.2f} {cloud.currency}" if cloud and cloud.disk_price else "no price: [cloud] disk_price"


IDLE_PERCENT = 5.0


def judge_instances(report: Report, found: Sequence[CloudInstance]) -> None:
    """Stopped instances still cost their disks; idle ones cost everything."""
    report.table(
        "EC2 instances",
        ("instance", "name", "type", "state", f"CPU of {CPU_DAYS} days", "launched"),
        [(one.id, one.name, one.kind, one.state, _percent(one), one.since.date()) for one in found],
    )
    running = [one for one in found if one.state == "running"]
    known = [(one, one.cpu_percent) for one in running if one.cpu_percent is not None]
    idle = [f"{_named(one)} {_percent(one)}" for one, percent in known if percent < IDLE_PERCENT]
    report.prefer(
        "idle instances",
        not idle,
        "find out their purpose; choose a smaller type, or terminate them",
        value=listed(idle),
        expected=f"at least {IDLE_PERCENT:g} %",
    )
    unknown = [_named(one) for one in running if one.cpu_percent is None]
    report.prefer(
        "CPU of instances",
        not unknown,
        "check that this user may read CloudWatch, and that it has metrics of them",
        value=f"not known for {listed(unknown)}" if unknown else "known",
    )
    stopped = [_named(one) for one in found if one.state == "stopped"]
    report.prefer(
        "stopped instances",
        not stopped,
        "create an image, then terminate them: their disks still cost money",
        value=listed(stopped),
    )


def judge_volumes(report: Report, cloud: Cloud, found: Sequence[Volume]) -> None:
    """Disks without an instance."""
    total = sum(one.gigabytes for one in found)
    value = f"{total} GB in {listed([one.id for one in found])}: {_money(cloud, total * cloud.disk_price)}"
    report.prefer(
        "unattached disks", not found, "create a snapshot, then delete them", value=value if found else "none"
    )
    rows = [
        (one.id, f"{one.gigabytes} GB", one.since.date(), _money(cloud, one.gigabytes * cloud.disk_price))
        for one in found
    ]
    report.table("Unattached disks", ("disk", "size", "since", "monthly cost"), rows)


def judge_addresses(report: Report, cloud: Cloud, found: Sequence[str]) -> None:
    """Addresses without an instance."""
    value = f"{listed(list(found))}: {_money(cloud, len(found) * cloud.address_price)}" if found else "none"
    report.prefer("unattached addresses", not found, "release them, unless a DNS name points to them", value=value)


def judge_buckets(report: Report, found: Sequence[BucketSize]) -> None:
    """The size of each bucket; WARN if CloudWatch has none."""
    rows = [
        (one.name, "not known" if one.bytes is None else size(one.bytes))
        for one in sorted(found, key=lambda one: -(one.bytes or 0))
    ]
    report.table("Buckets", ("bucket", "standard storage"), rows)
    unknown = [one.name for one in found if one.bytes is None]
    report.prefer(
        "sizes of buckets",
        not unknown,
        "check that this user may read CloudWatch; an empty or new bucket has no size there",
        value=f"not known for {listed(unknown)}" if unknown else "known",
    )


def judge_costs(report: Report, found: Sequence[Cost]) -> Mapping[str, float]:
    """The bill by month and service, the largest first. Returns it by month."""
    months = defaultdict[str, float](float)
    for one in found:
        months[one.month] += one.amount
    for month, amount in sorted(months.items()):
        report.fact(f"bill of {month}", f"{amount:,.2f} {found[0].unit}")
    rows = [
        (one.month, one.service, f"{one.amount:,.2f} {one.unit}")
        for one in sorted(found, key=lambda one: (one.month, one.amount), reverse=True)
    ]
    report.table("The bill", ("month", "service", "cost"), rows, most=30)
    report.prefer("the bill", bool(found), "check that Cost Explorer is enabled", value="read" if found else "empty")
    return months


def _named(one: CloudInstance) -> str:
    return f"{one.name or one.id} ({one.kind})"


def _percent(one: CloudInstance) -> str:
    return "not known" if one.cpu_percent is None else f"{one.cpu_percent:.1f} %"


def _money(cloud: Cloud, amount: float) -> str:
    return f"{amount:,.2f} {cloud.currency} a month" if amount else "no price: [cloud] disk_price, address_price"
