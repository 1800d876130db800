"""What the Docker Engine holds and what its containers take (§4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow

from blocks.docker import Docker
from blocks.environment import Environment
from runbook.page.form import read_forms
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.units import duration, size
from tasks.docker.inventory import Inventory, Limits, SeenContainer, read_inventory, short
from tasks.docker.usage import Use, read_use
from tasks.host.disk import disk_on

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
    report.prefer(
        "the engine's disk",
        used <= FULL_RATIO,
        "clean-docker frees what nobody uses, or take a larger disk",
        value=f"{used:.0%} used, {size(disk.free_bytes)} free at {found.root}",
        expected=f"at most {FULL_RATIO:.0%}",
    )


WARN_RATIO, CRITICAL_RATIO = 0.8, 0.95
MANY_RESTARTS = 5
NAMES = 8


def judge_containers(report: Report, found: Inventory, expected: Mapping[str, str]) -> None:
    """Those of the application must run; none may die again and again."""
    by_name = {one.name: one for one in found.containers}
    for name, role in expected.items():
        one = by_name.get(name)
        runs = one is not None and one.state == "running" and one.health != "unhealthy"
        state = f"{one.state} {one.health}".strip() if one else "there is none"
        report.require(
            f"container {name}",
            runs,
            f"look at its log: docker logs {name}; deploy-application makes it",
            value=state,
            expected=f"running: it is the {role}",
        )
    killed = [one.name for one in found.containers if one.out_of_memory]
    report.prefer(
        "out of memory",
        not killed,
        "raise their limit, or find what takes it: the kernel killed them",
        value=listed(killed),
    )
    unsteady = [f"{one.name} ({one.restarts})" for one in found.containers if one.restarts >= MANY_RESTARTS]
    report.prefer(
        "restarts",
        not unsteady,
        "look at their logs: the engine starts them again and again",
        value=listed(unsteady),
        expected=f"fewer than {MANY_RESTARTS}",
    )


def expected_in(block: Docker) -> Mapping[str, str]:
    """The application's containers: name → role."""
    return {block.name_of(role): role for role in block.containers}


def judge_leftovers(report: Report, found: Inventory, block: Docker) -> None:
    """What nobody uses, with bytes. A container of the application that stopped is no leftover."""
    stopped = [one for one in found.containers if one.stopped and one.name not in expected_in(block)]
    _leftover(report, "stopped containers", [one.name for one in stopped], sum(one.bytes for one in stopped))
    images, volumes = found.dangling_images(), found.dangling_volumes()
    _leftover(report, "images without a name", [one.name for one in images], sum(one.bytes for one in images))
    _leftover(
        report,
        "volumes that nobody mounts",
        [one.name for one in volumes],
        sum(max(one.bytes, 0) for one in volumes),
        "look what is in them; clean-docker removes those it is told by name",
    )
    _leftover(report, "networks that nobody is on", [one.name for one in found.dangling_networks()], 0)
    idle = [one for one in found.cache if not one.in_use]
    report.fact("build cache", f"{size(sum(one.bytes for one in idle))} of {len(idle)} records are not in use")


def judge_use(report: Report, found: Inventory, use: Mapping[str, Use]) -> None:
    """Each running container against its limits; without one, against the whole machine."""
    rows = []
    for one in found.containers:
        if one.stopped:
            continue
        taken = use.get(one.name)
        if taken is None:
            report.warn(f"use of {one.name}", "ask again: it ended while it was looked at", value="not known")
            continue
        most, cpus = one.limits.memory or found.memory, one.limits.cpus or found.processors
        ratio = taken.memory / most
        if ratio > WARN_RATIO:
            report.fail(
                f"memory of {one.name}",
                "raise its limit, or find what takes it: it is killed over it",
                value=f"{ratio:.0%} of {size(most)}",
                expected=f"at most {WARN_RATIO:.0%}",
                worst=Status.CRITICAL if ratio > CRITICAL_RATIO else Status.WARN,
            )
        if taken.cpus > cpus * CRITICAL_RATIO:
            report.warn(
                f"processors of {one.name}",
                "it is held back by its limit, if it goes on like this",
                value=f"{taken.cpus:.2f} of {cpus:g}",
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
    report.table("Running containers", ("container", "image", "processors", "of", "memory", "of", "used", "for"), rows)


def judge_limits(report: Report, found: Inventory, block: Docker) -> None:
    """No limit: one container can take the machine. Another limit than the environment's: somebody changed it."""
    free = [one.name for one in found.containers if not one.stopped and not (one.limits.memory and one.limits.cpus)]
    report.prefer(
        "containers without a limit",
        not free,
        "run them with --memory and --cpus: one can take the machine",
        value=listed(free),
        expected="none",
    )
    by_name = {one.name: one for one in found.containers}
    for role, wanted in block.containers.items():
        one = by_name.get(block.name_of(role))
        recommended = Limits(wanted.memory, wanted.reservation, wanted.cpus)
        if one and one.name not in free:
            report.prefer(
                f"limits of {one.name}",
                one.limits == recommended,
                "deploy-application makes it with those of [docker.containers], or correct them there",
                value=_shown(one.limits),
                expected=_shown(recommended),
            )


def tell_inventory(report: Report, found: Inventory) -> None:
    """Tables of everything that is not running."""
    report.table(
        "Stopped containers",
        ("container", "image", "state", "exit code", "bytes", "for"),
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
            (one.name, size(one.bytes) if one.bytes >= 0 else "not told", "no" if one.name in unused else "yes")
            for one in found.volumes
        ],
    )


def listed(names: Sequence[str]) -> str:
    """The first ones, and how many more."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more if names else "none"


def _leftover(report: Report, what: str, names: Sequence[str], taken: int, hint: str = "") -> None:
    value = f"{len(names)}, {size(taken)}: {listed(names)}" if names else "none"
    report.prefer(what, not names, hint or "clean-docker removes them", value=value)


def _limit(value: float, shown: str) -> str:
    if not value:
        return "no limit"
    return shown.format(value) if shown else size(value)


def _shown(limits: Limits) -> str:
    parts = (_limit(limits.memory, ""), _limit(limits.reservation, ""), _limit(limits.cpus, "{:g}"))
    return "memory {}, reservation {}, processors {}".format(*parts)


def _since(report: Report, one: SeenContainer) -> str:
    return duration(max((report.started - one.since).total_seconds(), 0))
