"""What costs money and does nothing: containers, leftovers of Docker, cloud resources (§4.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Annotated, TypeVar

from prefect import flow
from pydantic import Field

from blocks.cloud import Cloud
from blocks.environment import Environment
from flows.infrastructure.images.usage import listed
from runbook.errors import OpsError
from runbook.page.form import read_forms
from runbook.report import Report
from runbook.run import runbook
from runbook.units import size
from tasks.cloud import aws
from tasks.cloud.aws import CPU_DAYS, BucketSize, Cost, Instance, Volume
from tasks.docker.inventory import Inventory, read_inventory
from tasks.docker.usage import Use, read_use

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


IDLE_CPUS = 0.005
SPARE_RATIO = 0.25
LEAST_MEMORY = 64 << 20


def judge_size(report: Report, found: Inventory, taken: Sequence[Mapping[str, Use]]) -> None:
    """Who does nothing, and who could do with less: by the most that each took."""
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
            spare.append(f"{one.name} ({size(memory)} of {size(one.limits.memory)}; {size(enough)} would do)")
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
    report.table("Most that containers took", ("container", "samples", "processors", "of", "memory", "of"), rows)
    report.prefer(
        "idle containers",
        not idle,
        "ask what they are for; stop those that nobody needs",
        value=listed(idle),
        expected=f"over {IDLE_CPUS:g} processors",
    )
    report.prefer(
        "containers with far more memory than they take",
        not spare,
        "lower their memory under [docker.containers], then deploy-application with recreate",
        value=listed(spare),
    )


def tell_leftovers(report: Report, found: Inventory, cloud: Cloud | None) -> None:
    """What nobody uses, with its bytes and what they cost in a month."""
    stopped = [("stopped container", one.name, one.bytes) for one in found.containers if one.stopped]
    images = [("image without a name", one.name, one.bytes) for one in found.dangling_images()]
    volumes = [("volume", one.name, max(one.bytes, 0)) for one in found.dangling_volumes()]
    networks = [("network", one.name, 0) for one in found.dangling_networks()]
    cache = [("build cache", one.id, one.bytes) for one in found.cache if not one.in_use]
    left = [*stopped, *images, *volumes, *networks, *cache]
    price = cloud.disk_price if cloud else 0.0
    rows = [(kind, name, size(taken), money(taken / 1e9 * price, cloud)) for kind, name, taken in left]
    report.table("What nobody uses", ("what", "name", "bytes", "cost of a month"), rows)
    total = sum(taken for _, _, taken in left)
    report.prefer(
        "what nobody uses",
        not left,
        "clean-docker removes it; the link fills it in",
        value=f"{len(left)}, {size(total)}, {money(total / 1e9 * price, cloud)}" if left else "nothing",
    )


def money(amount: float, cloud: Cloud | None) -> str:
    """An amount, or that there is no price."""
    return f"{amount:,.2f} {cloud.currency}" if cloud and cloud.disk_price else "no price: [cloud] disk_price"


IDLE_PERCENT = 5.0
ROWS = 30


def judge_instances(report: Report, found: Sequence[Instance]) -> None:
    """Stopped ones still pay for their disks; idle ones for everything."""
    report.table(
        "EC2 instances",
        ("instance", "name", "type", "state", f"CPU of {CPU_DAYS} days", "since"),
        [(one.id, one.name, one.kind, one.state, _percent(one), one.since.date()) for one in found],
    )
    running = [one for one in found if one.state == "running"]
    known = [(one, one.cpu_percent) for one in running if one.cpu_percent is not None]
    idle = [f"{_named(one)} {_percent(one)}" for one, percent in known if percent < IDLE_PERCENT]
    report.prefer(
        "idle instances",
        not idle,
        "ask what they are for; a smaller type, or none",
        value=listed(idle),
        expected=f"at least {IDLE_PERCENT:g} %",
    )
    unknown = [_named(one) for one in running if one.cpu_percent is None]
    report.prefer(
        "what instances do",
        not unknown,
        "look whether CloudWatch may be read, and counts them",
        value=f"not known of {listed(unknown)}" if unknown else "known",
    )
    stopped = [_named(one) for one in found if one.state == "stopped"]
    report.prefer(
        "stopped instances", not stopped, "their disks are paid for: keep an image, or end them", value=listed(stopped)
    )


def judge_volumes(report: Report, cloud: Cloud, found: Sequence[Volume]) -> None:
    """Disks that nothing is attached to."""
    total = sum(one.gigabytes for one in found)
    value = f"{total} GB in {listed([one.id for one in found])}: {_money(cloud, total * cloud.disk_price)}"
    report.prefer("unattached disks", not found, "keep a snapshot, then delete them", value=value if found else "none")
    rows = [
        (one.id, f"{one.gigabytes} GB", one.since.date(), _money(cloud, one.gigabytes * cloud.disk_price))
        for one in found
    ]
    report.table("Unattached disks", ("disk", "size", "since", "cost of a month"), rows)


def judge_addresses(report: Report, cloud: Cloud, found: Sequence[str]) -> None:
    """Addresses that lead nowhere."""
    value = f"{listed(list(found))}: {_money(cloud, len(found) * cloud.address_price)}" if found else "none"
    report.prefer("unattached addresses", not found, "release them, unless a DNS name leads there", value=value)


def judge_buckets(report: Report, found: Sequence[BucketSize]) -> None:
    """Sizes; one that nobody counted is told."""
    rows = [
        (one.name, "not known" if one.bytes is None else size(one.bytes))
        for one in sorted(found, key=lambda one: -(one.bytes or 0))
    ]
    report.table("Buckets", ("bucket", "standard storage"), rows)
    unknown = [one.name for one in found if one.bytes is None]
    report.prefer(
        "sizes of buckets",
        not unknown,
        "CloudWatch has no number: empty, or too new, or not to be read",
        value=f"not known of {listed(unknown)}" if unknown else "known",
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
        for one in sorted(found, key=lambda one: (one.month, one.amount), reverse=True)[:ROWS]
    ]
    report.table("The bill", ("month", "service", "cost"), rows)
    report.prefer("the bill", bool(found), "look whether Cost Explorer is enabled", value="read" if found else "empty")
    return months


def _named(one: Instance) -> str:
    return f"{one.name or one.id} ({one.kind})"


def _percent(one: Instance) -> str:
    return "not known" if one.cpu_percent is None else f"{one.cpu_percent:.1f} %"


def _money(cloud: Cloud, amount: float) -> str:
    return f"{amount:,.2f} {cloud.currency} a month" if amount else "no price: [cloud] disk_price, address_price"
