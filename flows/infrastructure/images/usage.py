"""The Docker Engine's contents, and the resource usage of its containers (§4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from blocks.docker import Docker
from blocks.environment import Environment
from runbook import metrics
from runbook.flow import flow
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.docker.inventory import ContainerLimits, Inventory, SeenContainer, read_inventory, short
from tasks.docker.usage import ContainerUse, read_use
from tasks.host.disk import disk_on


@flow(name="check-docker-usage", flow_run_name=RunName("check-docker-usage {environment}"))
def check_docker_usage(environment: str) -> Report:
    """コスト最適化: 未使用リソースの特定・リソース使用量の監視 (§4.2)

    Lists what uses space on the Docker Engine, with bytes: stopped containers, images without a tag, unused volumes and
    networks, the build cache. Compares the CPU and memory usage of each running container with its limits. Reports
    containers without a limit, with another limit than [docker.containers] (default: the manual's 512m, 256m, 0.5), out
    of memory, or restarting repeatedly. Run it weekly.

    It changes nothing. clean-docker frees the space.

    Departs from the manual: `docker network ls --filter dangling=true` includes networks of stopped containers, which
    cannot start without them; here they count as used. `docker stats` shows one moment; review-resources takes more
    samples.

    Args:
        environment: Environment (lab, staging, production …)
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
        attach_inventory(report, found)
        running = sum(not one.stopped for one in found.containers)
        report.outcome = f"{running} of {len(found.containers)} containers run; layers use {size(found.layers_bytes)}"
    return report


def _judge_disk(report: Report, block: Docker, found: Inventory) -> None:
    local = not block.host or block.host.startswith("unix:")
    disk = disk_on("" if local else block.host, Path(found.root))
    if disk is None:
        report.warn(
            "the engine's disk", "check its free space on the engine's host", value="not visible from this host or user"
        )
        return
    hint = "remove unused images and containers, or enlarge the disk"
    of = f"{found.root}, {size(disk.free_bytes)} free"
    report.judge(metrics.DISK, disk.used_ratio, hint, of=of, worst=Status.WARN, follow=[CLEAN])


CLEAN = Next("clean-docker", "remove unused parts (plan first)")
DEPLOY = Next("deploy-application")
BUSY_RATIO = 0.95
MANY_RESTARTS = 5
NAMES = 8


def judge_containers(report: Report, found: Inventory, expected: Mapping[str, str]) -> None:
    """The application's containers must run; none may restart repeatedly."""
    by_name = {one.name: one for one in found.containers}
    for name, role in expected.items():
        one = by_name.get(name)
        runs = one is not None and one.state == "running" and one.health != "unhealthy"
        state = f"{one.state} {one.health}".strip() if one else "missing"
        report.require(
            f"container {name}",
            runs,
            f"check its log: docker logs {name}; if it is missing, deploy it",
            value=state,
            expected=f"running: it is the {role}",
            follow=[DEPLOY],
        )
    killed = [one.name for one in found.containers if one.out_of_memory]
    report.prefer(
        "out of memory",
        not killed,
        "raise their memory limit, or find the leak: the kernel killed them",
        value=listed(killed),
    )
    unsteady = [f"{one.name} ({one.restarts})" for one in found.containers if one.restarts >= MANY_RESTARTS]
    report.prefer(
        "restarts",
        not unsteady,
        "check their logs: the engine restarts them repeatedly",
        value=listed(unsteady),
        expected=f"fewer than {MANY_RESTARTS}",
    )


def expected_in(block: Docker) -> Mapping[str, str]:
    """The application's containers: name → role."""
    return {block.name_of(role): role for role in block.containers}


def judge_leftovers(report: Report, found: Inventory, block: Docker) -> None:
    """Unused parts, with bytes. The application's own stopped containers do not count."""
    stopped = [one for one in found.containers if one.stopped and one.name not in expected_in(block)]
    _leftover(report, "stopped containers", [one.name for one in stopped], sum(one.bytes for one in stopped))
    images, volumes = found.dangling_images(), found.dangling_volumes()
    _leftover(report, "images without a tag", [one.name for one in images], sum(one.bytes for one in images))
    _leftover(
        report,
        "volumes without a mount",
        [one.name for one in volumes],
        sum(max(one.bytes, 0) for one in volumes),
        "check their content; then remove them with clean-docker by name (volumes)",
    )
    _leftover(report, "networks without containers", [one.name for one in found.dangling_networks()], 0)
    idle = [one for one in found.cache if not one.in_use]
    report.fact("build cache", f"{size(sum(one.bytes for one in idle))} in {len(idle)} unused records")


def judge_use(report: Report, found: Inventory, use: Mapping[str, ContainerUse]) -> None:
    """Each running container against its limits; without a limit, against the whole host."""
    rows = []
    for one in found.containers:
        if one.stopped:
            continue
        taken = use.get(one.name)
        if taken is None:
            report.warn(
                f"usage of {one.name}", "run this again: the container ended during the check", value="not known"
            )
            continue
        most, cpus = one.limits.memory or found.memory, one.limits.cpus or found.processors
        ratio = taken.memory / most
        if ratio > report.limit(metrics.CONTAINER_MEMORY)[0]:
            hint = "raise its limit, or find the leak: the kernel kills it at the limit"
            report.judge(metrics.CONTAINER_MEMORY, ratio, hint, of=f"{one.name}, limit {size(most)}")
        if taken.cpus > cpus * BUSY_RATIO:
            report.warn(
                f"CPU of {one.name}",
                "raise its limit, or find the cause: at the limit the kernel throttles it",
                value=f"{taken.cpus:.2f} of {cpus:g} processors",
            )
        rows.append(
            (
                one.name,
                one.image,
                f"{taken.cpus:.2f}",
                _limit(one.limits.cpus, "{:g}"),
                size(taken.memory),
                _limit(one.limits.memory, ""),
                f"{ratio:.0%}",
                _since(report, one),
            )
        )
    report.table(
        "Running containers", ("container", "image", "CPUs", "limit", "memory", "limit", "used", "running for"), rows
    )


def judge_limits(report: Report, found: Inventory, block: Docker) -> None:
    """Without a limit one container can exhaust the host. A limit other than the environment's was changed by hand."""
    free = [one.name for one in found.containers if not one.stopped and not (one.limits.memory and one.limits.cpus)]
    report.prefer(
        "containers without a limit",
        not free,
        "run them with --memory and --cpus: one container can exhaust the host",
        value=listed(free),
        expected="none",
    )
    by_name = {one.name: one for one in found.containers}
    for role, wanted in block.containers.items():
        one = by_name.get(block.name_of(role))
        recommended = ContainerLimits(wanted.memory, wanted.reservation, wanted.cpus)
        if one and one.name not in free:
            report.prefer(
                f"limits of {one.name}",
                one.limits == recommended,
                "deploy it again with the limits of [docker.containers], or correct them there",
                value=_shown(one.limits),
                expected=_shown(recommended),
                follow=[DEPLOY],
            )


def attach_inventory(report: Report, found: Inventory) -> None:
    """Tables of the stopped containers, the images and the volumes."""
    report.table(
        "Stopped containers",
        ("container", "image", "state", "exit code", "bytes", "stopped for"),
        [
            (one.name, one.image, one.state, one.exit_code, size(one.bytes), _since(report, one))
            for one in found.containers
            if one.stopped
        ],
    )
    used = {one.image_id for one in found.containers}
    report.table(
        "Images",
        ("image", "id", "own bytes", "containers"),
        [
            (", ".join(one.tags) or "(none)", short(one.id), size(one.bytes), "yes" if one.id in used else "none")
            for one in sorted(found.images, key=lambda one: -one.bytes)
        ],
    )
    unused = {one.name for one in found.dangling_volumes()}
    report.table(
        "Volumes",
        ("volume", "bytes", "mounted"),
        [
            (one.name, size(one.bytes) if one.bytes >= 0 else "not known", "no" if one.name in unused else "yes")
            for one in found.volumes
        ],
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more if names else "none"


def _leftover(report: Report, what: str, names: Sequence[str], taken: int, hint: str = "") -> None:
    value = f"{len(names)}, {size(taken)}: {listed(names)}" if names else "none"
    report.prefer(what, not names, hint or "remove them", value=value, follow=[CLEAN])


def _limit(value: float, shown: str) -> str:
    if not value:
        return "no limit"
    return shown.format(value) if shown else size(value)


def _shown(limits: ContainerLimits) -> str:
    parts = (_limit(limits.memory, ""), _limit(limits.reservation, ""), _limit(limits.cpus, "{:g}"))
    return "memory {}, reservation {}, processors {}".format(*parts)


def _since(report: Report, one: SeenContainer) -> str:
    return duration(max((report.started - one.since).total_seconds(), 0))
