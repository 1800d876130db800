"""Replace a container with a new version, and roll back.

The new container is created alongside the old one (`name-next`). Then the old one is stopped and kept (`name-before`)
until the new one is proven. An unhealthy new container is kept (`name-failed`) until its log is read; the old one
runs again first. Each step is safe to repeat after a kill: the names show how far the last run came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import docker.errors

from blocks.docker import Docker, engine
from runbook.current import leaves, removed
from runbook.errors import OpsError
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.docker.building import SILENT_SECONDS, read_digest
from tasks.docker.deployed import failed_name, find, previous_name
from tasks.docker.described import options

DEPLOY = "deploy"
STOP_SECONDS = 150


@dataclass(frozen=True)
class WantedContainer:
    """The image to deploy for a role. `digest`: in the registry, "" if unknown; `image_id`: of the local image, ""
    before the pull."""

    role: str
    name: str
    reference: str
    digest: str
    image_id: str

    @property
    def image(self) -> str:
        """The image by its content: a tag can move at any time."""
        return f"{self.reference.rpartition(':')[0]}@{self.digest}" if self.digest else self.image_id


def next_name(name: str) -> str:
    """The name of a new container until the old one is stopped."""
    return f"{name}-next"


def _acts(wanted: Sequence[WantedContainer]) -> list[Act]:
    return [Act(DEPLOY, f"{one.reference} as {one.name}") for one in wanted]


def _of(wanted: Sequence[WantedContainer], roles: Collection[str]) -> list[WantedContainer]:
    return [one for one in wanted if one.role in roles]


@probe
def find_images(block: Docker, roles: Sequence[str], version: str) -> list[WantedContainer]:
    """The images of a version, in the registry and on the engine. A local image is enough: a rollback must work without
    the registry, with the digest of the last pull or push.

    Raises:
        OpsError: an image is neither local nor in the registry.
    """
    found = []
    with engine(block.host) as client:
        for role in roles:
            reference, digest, away = f"{block.repository(role)}:{version}", "", "no registry is configured"
            if block.registry:
                try:
                    digest, away = read_digest.work(block, reference), "the registry has none"
                except OpsError as error:
                    away = error.message
            local = _inspected(client, reference)
            digest = digest or _digest_of(local, block.repository(role))
            if not digest and not local:
                raise OpsError(
                    f"there is no image {reference}: not on the engine, and {away}",
                    "build it (build-images with push), or correct the version",
                )
            found.append(WantedContainer(role, block.name_of(role), reference, digest, str(local.get("Id", ""))))
    return found


def _inspected(client: Any, image: str) -> Mapping[str, Any]:
    """A local image, {} if there is none."""
    try:
        found: Mapping[str, Any] = client.api.inspect_image(image)
        return found
    except docker.errors.ImageNotFound:
        return {}


def _digest_of(image: Mapping[str, Any], repository: str) -> str:
    """The registry's digest of a local image, "" if it was neither pulled nor pushed."""
    named = (one.partition("@") for one in image.get("RepoDigests") or [])
    return next((digest for name, _, digest in named if name == repository), "")


@action(of=_acts, idempotent=True)
def pull_images(block: Docker, wanted: Sequence[WantedContainer]) -> dict[str, str]:
    """Pull the planned images by digest, whatever the tag means now, and set the local tag to them. Returns role → id
    of the image.

    Raises:
        OpsError: an image cannot be pulled.
    """
    pulled = {}
    with engine(block.host, seconds=SILENT_SECONDS) as client:
        for one in wanted:
            repository, _, tag = one.reference.rpartition(":")
            if one.digest and not _inspected(client, one.image):
                for part in client.api.pull(
                    repository, tag=one.digest, stream=True, decode=True, auth_config=block.login(one.reference)
                ):
                    if "error" in part:
                        raise OpsError(f"{one.image} cannot be pulled: {part['error']}", "check the registry")
            if one.digest:
                client.api.tag(one.image, repository, tag)
            pulled[one.role] = str(client.api.inspect_image(one.image)["Id"])
    return pulled


@action(of=_acts, idempotent=True, staged=True)
def create_containers(block: Docker, wanted: Sequence[WantedContainer], roles: Collection[str]) -> dict[str, str]:
    """Create the containers of these roles alongside the running ones, without starting them: errors of their
    configuration show now. Returns role → id of the new container.

    Raises:
        OpsError: the engine refuses one, or its env_file cannot be read.
    """
    created = {}
    with engine(block.host) as client:
        for one in _of(wanted, roles):
            if left := find(client, next_name(one.name)):  # of a killed run
                left.remove(force=True)
            described = options(block.container(one.role))
            leaves(f"container {next_name(one.name)}", "the next deploy-application removes it")
            created[one.role] = client.containers.create(
                one.image, name=next_name(one.name), detach=True, **described
            ).id
    return created


@action(of=_acts, idempotent=True)
def swap_containers(block: Docker, wanted: Sequence[WantedContainer], roles: Collection[str]) -> None:
    """Stop and rename the old container of each role, start the new one under its name. A container that a killed run
    kept stays the one to roll back to; its unproven successor is removed.

    Raises:
        OpsError: the engine refuses an operation, for example the start.
    """
    with engine(block.host, seconds=STOP_SECONDS) as client:
        for one in _of(wanted, roles):
            if following := find(client, next_name(one.name)):  # else it has its final name already
                if current := find(client, one.name):
                    current.stop()
                    if find(client, previous_name(one.name)):
                        current.remove()
                    else:
                        _never_start(current)
                        current.rename(previous_name(one.name))
                following.rename(one.name)
                removed(f"container {next_name(one.name)}")
            client.containers.get(one.name).start()


@action(of=_acts, idempotent=True)
def roll_back_containers(
    block: Docker, wanted: Sequence[WantedContainer], roles: Collection[str], created: Mapping[str, str]
) -> list[str]:
    """Restore and start the old containers of these roles; the new ones are stopped and kept for their logs. Returns
    the roles without an old container: only the new one (`created`) exists.

    Raises:
        OpsError: the engine refuses an operation.
    """
    without = []
    with engine(block.host, seconds=STOP_SECONDS) as client:
        for one in _of(wanted, roles):
            if left := find(client, next_name(one.name)):
                left.remove(force=True)
                removed(f"container {next_name(one.name)}")
            previous, current = find(client, previous_name(one.name)), find(client, one.name)
            if previous:
                if current:
                    _keep_failed(client, current, one.name)
                previous.update(restart_policy=options(block.container(one.role))["restart_policy"])
                previous.rename(one.name)
            elif not current or current.id == created.get(one.role):
                without.append(one.role)
                continue
            client.containers.get(one.name).start()
    return without


def _keep_failed(client: Any, current: Any, name: str) -> None:
    """Without its restart policy: a restarted engine would start it together with the old one."""
    if left := find(client, failed_name(name)):  # of a killed run
        left.remove(force=True)
    _never_start(current)
    current.stop(timeout=0)
    current.rename(failed_name(name))


def _never_start(container: Any) -> None:
    """An engine that starts again would start a container whose policy is `always` next to its successor."""
    never = {"Name": "no"}
    try:
        container.update(restart_policy=never)
    except docker.errors.APIError:  # it ended in this very moment: a stopped one can be updated
        container.stop(timeout=0)
        container.update(restart_policy=never)


@action(of=_acts, idempotent=True)
def remove_failed(block: Docker, wanted: Sequence[WantedContainer], roles: Collection[str]) -> None:
    """Remove the unhealthy containers of these roles, after their logs are in the report. Images and volumes are
    kept."""
    with engine(block.host) as client:
        for one in _of(wanted, roles):
            if left := find(client, failed_name(one.name)):
                left.remove(force=True)


@action(of=_acts, idempotent=True)
def remove_previous(block: Docker, wanted: Sequence[WantedContainer]) -> None:
    """Remove the old containers, after the new ones are proven. Images and volumes are kept."""
    with engine(block.host) as client:
        for one in wanted:
            for name in (previous_name(one.name), failed_name(one.name)):
                if left := find(client, name):
                    left.remove()
