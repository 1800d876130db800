"""Remove unused containers, images, networks and caches of the Docker Engine (§4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from blocks.services.service import DockerServices
from flows.deleting import judge_clocks, limit_unattended
from flows.pinned import pin_deleted
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted, duration, size
from tasks.docker.choosing import CleanupSelection, Doomed, Kind, choose
from tasks.docker.deployed import failed_name, previous_name
from tasks.docker.inventory import read_inventory
from tasks.docker.removing import Removed, remove

Part = Literal["containers", "images", "networks", "build cache"]
KINDS: dict[Part, Kind] = {
    "containers": "container",
    "images": "image",
    "networks": "network",
    "build cache": "build cache",
}


@flow(name="clean-docker", flow_run_name=RunName("clean-docker {environment} {parts}"))
def clean_docker(
    environment: str,
    parts: tuple[Part, ...] = ("containers", "images", "networks", "build cache"),
    older_than_hours: Annotated[int, Field(ge=0)] = 168,
    keep_tags: Annotated[int, Field(ge=1)] = 3,
    label: str = "",
    volumes: tuple[str, ...] = (),
    plan: str = "",
    confirm: str = "",
) -> Report:
    """未使用イメージのクリーンアップ (§4.1)

    Removes stopped containers, images that no container uses, networks without containers, and the build cache, if they
    are older than `older_than_hours`. The newest `keep_tags` images of each repository are kept for a rollback. Run it
    weekly, or when check-docker-usage reports a full disk.

    It cannot be undone. Running containers, and all containers of the application, are kept. Each item is checked again
    right before its removal, and never removed by force: an item that is in use by then is kept and reported. Volumes
    hold data: only those that `volumes` names are removed, and only if no container mounts them. In a contained
    environment nothing is removed.

    Departs from the manual: `docker system prune -a --volumes` also removes the images for a rollback, and every volume
    that is not mounted at this moment.

    Args:
        environment: Environment (lab, staging, production …)
        parts: What to delete (stopped containers, unused images, networks, the build cache)
        older_than_hours: Delete only what is older than this many hours
        keep_tags: Newest images to keep in each repository
        label: Only objects with this label (key or key=value). Empty: no condition
        volumes: Volumes to delete. Only these are deleted. Empty: none
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Clean Docker", env, confirm, plan, changes=True) as report:
        if not parts and not volumes:
            raise OpsError("nothing is chosen", "choose containers, images, networks or build cache, or name volumes")
        judge_clocks(report, env)
        before = datetime.now(UTC) - timedelta(hours=older_than_hours)
        kinds = [KINDS[part] for part in parts]
        found = read_inventory(env.docker.host)
        doomed = choose(found, CleanupSelection(kinds, before, keep_tags, label, _own(env), volumes))
        doomed = list(limit_unattended(report, env, "parts of Docker", doomed, found.parts))
        report.fact("layers before", size(found.layers_bytes))
        if not doomed:
            report.outcome = f"nothing unused is older than {older_than_hours} h"
            return report
        removal = _removal(env, doomed, report.started)
        freed = size(sum(one.bytes for one in doomed))
        report.fact("space to free", f"at least {size(sum(one.bytes for one in doomed))}")
        lost = (
            f"the data of {counted(len(volumes), 'volume')} is lost"
            if volumes
            else "files inside stopped containers are lost"
        )
        effect = Effect(f"deletes {counted(len(doomed), 'unused object')} of Docker (at least {freed})", "", lost)
        with carrying_out(report, removal, effect=effect) as carry:
            done = carry(removal)
        report.table(
            "Removed",
            ("kind", "name", "bytes", "result"),
            [(item.doomed.kind, item.doomed.name, size(item.doomed.bytes), item.kept or "removed") for item in done],
        )
        kept = [item for item in done if item.kept]
        if kept:
            report.warn(
                "kept after all",
                "run this again to remove them: they were in use right before the removal",
                value="; ".join(f"{item.doomed.name}: {item.kept}" for item in kept[:5]),
            )
        removed = [item.doomed for item in done if not item.kept]
        report.fact("layers after", size(read_inventory.after(done)(env.docker.host).layers_bytes))
        report.outcome = f"{len(removed)} of {len(done)} removed, {size(sum(one.bytes for one in removed))}"
    return report


def _removal(env: Environment, doomed: Sequence[Doomed], now: datetime) -> Change[[], list[Removed]]:
    """Plan one line for each object."""
    steps = list[PlannedStep]()
    for one in doomed:
        age = duration((now - one.since).total_seconds())
        steps.append(PlannedStep(f"remove {one.kind}", f"{one.name}: {one.why}, aged {age}", one.bytes))
    first, *others = steps
    return Change(
        remove.bind(env.docker.host, doomed),
        first.step,
        first.detail,
        size=first.bytes,
        more=others,
        pins=[lambda report: pin_deleted(report, "unused in Docker", ((one.id, one.bytes) for one in doomed))],
    )


def _own(env: Environment) -> set[str]:
    """The application's containers: a recovery can have stopped one on purpose."""
    own = {env.docker.name_of(role) for role in env.docker.containers}
    if isinstance(env.services, DockerServices):
        own |= set(env.services.names.values())
    return own | {name_of(name) for name in own for name_of in (previous_name, failed_name)}
