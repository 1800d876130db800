"""Findings of review-resources about Docker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blocks.cloud import Cloud
from flows.infrastructure.usage_findings import listed
from runbook.render import size
from runbook.report import Report, Status
from tasks.docker.inventory import Inventory
from tasks.docker.usage import Use

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
        rows.append((one.name, len(uses), f"{cpus:.3f}", f"{one.limits.cpus:g}" if one.limits.cpus else "no limit",
                     size(memory), size(one.limits.memory) if one.limits.memory else "no limit"))  # fmt: skip
    report.table("Most that containers took", ("container", "samples", "processors", "of", "memory", "of"), rows)
    report.expect("idle containers", not idle, "ask what they are for; stop those that nobody needs",
                  value=listed(idle), expected=f"over {IDLE_CPUS:g} processors", otherwise=Status.WARN)  # fmt: skip
    report.expect("containers with far more memory than they take", not spare,
                  "lower their memory under [docker.containers], then deploy-application with recreate",
                  value=listed(spare), otherwise=Status.WARN)  # fmt: skip


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
    report.expect("what nobody uses", not left, "clean-docker removes it; the link fills it in",
                  value=f"{len(left)}, {size(total)}, {money(total / 1e9 * price, cloud)}" if left else "nothing",
                  otherwise=Status.WARN)  # fmt: skip


def money(amount: float, cloud: Cloud | None) -> str:
    """An amount, or that there is no price."""
    return f"{amount:,.2f} {cloud.currency}" if cloud and cloud.disk_price else "no price: [cloud] disk_price"
