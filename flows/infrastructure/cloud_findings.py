"""Findings of review-resources about an account at a cloud provider."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from blocks.cloud import Cloud
from flows.infrastructure.usage_findings import listed
from runbook.render import size
from runbook.report import Report, Status
from tasks.cloud.aws import CPU_DAYS, BucketSize, Cost, Instance, Volume

IDLE_PERCENT = 5.0
ROWS = 30


def judge_instances(report: Report, found: Sequence[Instance]) -> None:
    """Stopped ones still pay for their disks; idle ones for everything."""
    report.table("EC2 instances", ("instance", "name", "type", "state", f"CPU of {CPU_DAYS} days", "since"),
                 [(one.id, one.name, one.kind, one.state, _percent(one), one.since.date())
                  for one in found])  # fmt: skip
    running = [one for one in found if one.state == "running"]
    known = [(one, one.cpu_percent) for one in running if one.cpu_percent is not None]
    idle = [f"{_named(one)} {_percent(one)}" for one, percent in known if percent < IDLE_PERCENT]
    report.expect("idle instances", not idle, "ask what they are for; a smaller type, or none", value=listed(idle),
                  expected=f"at least {IDLE_PERCENT:g} %", otherwise=Status.WARN)  # fmt: skip
    unknown = [_named(one) for one in running if one.cpu_percent is None]
    report.expect("what instances do", not unknown, "look whether CloudWatch may be read, and counts them",
                  value=f"not known of {listed(unknown)}" if unknown else "known", otherwise=Status.WARN)  # fmt: skip
    stopped = [_named(one) for one in found if one.state == "stopped"]
    report.expect("stopped instances", not stopped, "their disks are paid for: keep an image, or end them",
                  value=listed(stopped), otherwise=Status.WARN)  # fmt: skip


def judge_volumes(report: Report, cloud: Cloud, found: Sequence[Volume]) -> None:
    """Disks that nothing is attached to."""
    total = sum(one.gigabytes for one in found)
    value = f"{total} GB in {listed([one.id for one in found])}: {_money(cloud, total * cloud.disk_price)}"
    report.expect("unattached disks", not found, "keep a snapshot, then delete them", value=value if found else "none",
                  otherwise=Status.WARN)  # fmt: skip
    rows = [(one.id, f"{one.gigabytes} GB", one.since.date(), _money(cloud, one.gigabytes * cloud.disk_price))
            for one in found]  # fmt: skip
    report.table("Unattached disks", ("disk", "size", "since", "cost of a month"), rows)


def judge_addresses(report: Report, cloud: Cloud, found: Sequence[str]) -> None:
    """Addresses that lead nowhere."""
    value = f"{listed(list(found))}: {_money(cloud, len(found) * cloud.address_price)}" if found else "none"
    report.expect("unattached addresses", not found, "release them, unless a DNS name leads there", value=value,
                  otherwise=Status.WARN)  # fmt: skip


def judge_buckets(report: Report, found: Sequence[BucketSize]) -> None:
    """Sizes; one that nobody counted is told."""
    rows = [(one.name, "not known" if one.bytes is None else size(one.bytes))
            for one in sorted(found, key=lambda one: -(one.bytes or 0))]  # fmt: skip
    report.table("Buckets", ("bucket", "standard storage"), rows)
    unknown = [one.name for one in found if one.bytes is None]
    report.expect("sizes of buckets", not unknown, "CloudWatch has no number: empty, or too new, or not to be read",
                  value=f"not known of {listed(unknown)}" if unknown else "known", otherwise=Status.WARN)  # fmt: skip


def judge_costs(report: Report, found: Sequence[Cost]) -> Mapping[str, float]:
    """The bill by month and service, the largest first. Returns it by month."""
    months = defaultdict[str, float](float)
    for one in found:
        months[one.month] += one.amount
    for month, amount in sorted(months.items()):
        report.fact(f"bill of {month}", f"{amount:,.2f} {found[0].unit}")
    rows = [(one.month, one.service, f"{one.amount:,.2f} {one.unit}") for one in
            sorted(found, key=lambda one: (one.month, one.amount), reverse=True)[:ROWS]]  # fmt: skip
    report.table("The bill", ("month", "service", "cost"), rows)
    report.expect("the bill", bool(found), "look whether Cost Explorer is enabled", value="read" if found else "empty",
                  otherwise=Status.WARN)  # fmt: skip
    return months


def _named(one: Instance) -> str:
    return f"{one.name or one.id} ({one.kind})"


def _percent(one: Instance) -> str:
    return "not known" if one.cpu_percent is None else f"{one.cpu_percent:.1f} %"


def _money(cloud: Cloud, amount: float) -> str:
    return f"{amount:,.2f} {cloud.currency} a month" if amount else "no price: [cloud] disk_price, address_price"
