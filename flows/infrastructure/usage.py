"""What the Docker Engine holds and what its containers take (§4.2)."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from blocks.docker import Docker
from blocks.environment import Environment
from flows.infrastructure.usage_findings import (
    expected_in,
    judge_containers,
    judge_leftovers,
    judge_limits,
    judge_use,
    tell_inventory,
)
from runbook.form import read_forms
from runbook.render import size
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.docker.inventory import Inventory, read_inventory
from tasks.docker.usage import read_use
from tasks.host import disk_on

FULL_RATIO = 0.85


@flow(name="check-docker-usage", flow_run_name="check-docker-usage {environment}")
def check_docker_usage(environment: str) -> Report:
    """コスト最適化: 未使用リソースの特定・リソース使用量の監視 (§4.2)

    Shows what the Docker Engine holds, with bytes: stopped containers, images without a name, volumes and networks
    that nobody uses, the build cache; and what each running container takes of processors and memory against its
    limits. Containers without a limit, or with another one than [docker.containers] says (the manual's: 512m, 256m,
    0.5), are told, as are those that were out of memory or that restart again and again. Run it weekly.

    It changes nothing. clean-docker frees what is found here.

    Departs from the manual: `docker network ls --filter dangling=true` counts networks of stopped containers, which
    could not be started without them: they are in use here. `docker stats` shows one moment: review-resources looks
    at more.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Check Docker usage", env) as report:
        block = env.docker
        found = read_inventory(block.host)
        report.fact("engine", f"Docker {found.version}, {found.processors} processors, {size(found.memory)} of memory")
        judge_containers(report, found, expected_in(block))
        judge_leftovers(report, found, block)
        judge_use(report, found, read_use(block.host, found.containers))
        judge_limits(report, found, block)
        _judge_disk(report, block, found)
        tell_inventory(report, found)
        link = read_forms([env.name]).link("clean-docker", env.name, {"environment": env.name})
        report.fact("what frees it", link)
        running = sum(not one.stopped for one in found.containers)
        report.outcome = f"{running} of {len(found.containers)} containers run; layers take {size(found.layers_bytes)}"
    return report


def _judge_disk(report: Report, block: Docker, found: Inventory) -> None:
    local = not block.host or block.host.startswith("unix:")
    disk = disk_on("" if local else block.host, Path(found.root))
    if disk is None:
        report.warn("the engine's disk", "look at its free space there", value="this host or user cannot see it")
        return
    used = 1 - disk.free_bytes / disk.total_bytes
    report.expect("the engine's disk", used <= FULL_RATIO, "clean-docker frees what nobody uses, or take a larger disk",
                  value=f"{used:.0%} used, {size(disk.free_bytes)} free at {found.root}",
                  expected=f"at most {FULL_RATIO:.0%}", otherwise=Status.WARN)  # fmt: skip
