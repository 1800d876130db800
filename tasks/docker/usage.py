"""CPU and memory usage of containers, calculated like `docker stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import docker.errors

from blocks.docker import engine
from runbook.kinds import probe
from tasks.docker.inventory import SeenContainer

AT_ONCE = 8


@dataclass(frozen=True)
class ContainerUse:
    """A container's usage within about 1 s: CPUs (1.0: one CPU completely), and bytes of memory without the file cache
    that the kernel can drop."""

    cpus: float
    memory: int


@probe
def read_use(host: str, containers: Sequence[SeenContainer]) -> Mapping[str, ContainerUse]:
    """One sample of each running container, by name; containers that end meanwhile are left out.

    Raises:
        Unreachable: the engine does not answer.
        OpsError: it refuses.
    """
    running = [one for one in containers if not one.stopped]
    with engine(host) as client, ThreadPoolExecutor(AT_ONCE) as threads:

        def sample(one: SeenContainer) -> ContainerUse | None:
            try:
                return use_of(client.api.stats(one.id, stream=False))
            except docker.errors.NotFound:
                return None

        found = zip(running, threads.map(sample, running), strict=True)
        return {one.name: use for one, use in found if use}


def use_of(stats: Mapping[str, Any]) -> ContainerUse | None:
    """Usage by the formula of the docker client; None if the container is stopped.

    https://docs.docker.com/reference/api/engine/ (ContainerStats)
    """
    now, before, memory = stats.get("cpu_stats") or {}, stats.get("precpu_stats") or {}, stats.get("memory_stats") or {}
    if "usage" not in memory or "system_cpu_usage" not in now:
        return None
    taken = now["cpu_usage"]["total_usage"] - before.get("cpu_usage", {}).get("total_usage", 0)
    passed = now["system_cpu_usage"] - before.get("system_cpu_usage", 0)
    processors = now.get("online_cpus") or len(now["cpu_usage"].get("percpu_usage") or [1])
    details = memory.get("stats") or {}
    files = details.get("total_inactive_file", details.get("inactive_file", 0))  # cgroup v1, v2
    used = memory["usage"] - files if files < memory["usage"] else memory["usage"]
    return ContainerUse(max(taken, 0) / passed * processors if passed > 0 else 0.0, int(used))
