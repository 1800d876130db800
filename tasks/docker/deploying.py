"""A version of a container in the place of another, with the way back.

The new one is made beside the old one (`name-next`), which is stopped only then and kept (`name-before`) until the new
one has proven itself. One that was not healthy is kept (`name-failed`) until its log has been read: the old one runs
again first. Each step may be done again after a death: what is there says how far the last run came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import docker.errors

from blocks.docker import Docker, engine
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.kinds import action, probe
from tasks.docker.building import SILENT_SECONDS, read_digest
from tasks.docker.deployed import aside, failed, find
from tasks.docker.described import options

DEPLOY = "deploy"
STOP_SECONDS = 150


@dataclass(frozen=True)
class Wanted:
    """The image that a role shall have. `digest` is the registry's, "" where no registry gave it one; `image_id` is the
    local one's, "" before it was pulled."""

    role: str
    name: str
    reference: str
    digest: str
    image_id: str

    @property
    def image(self) -> str:
        """By its content: a tag may mean another image a moment later."""
        return f"{self.reference.rpartition(':')[0]}@{self.digest}" if self.digest else self.image_id


def upcoming(name: str) -> str:
    """What a container is called until the one before it has stopped."""
    return f"{name}-next"


def act_of(wanted: Wanted) -> Act:
    """What has to be permitted."""
    return Act(DEPLOY, f"{wanted.reference} as {wanted.name}")


@probe
def find_images(block: Docker, roles: Sequence[str], version: str) -> list[Wanted]:
    """The images of a version: in the registry, and here. A registry that is away is no obstacle where the image is
    here already: going back must work then, with the digest that the image was pulled or pushed by.

    Raises:
        OpsError: one is nowhere.
    """
    found = []
    with engine(block.host) as client:
        for role in roles:
            reference, digest, away = f"{block.repository(role)}:{version}", "", "there is no registry"
            if block.registry:
                try:
                    digest, away = read_digest.work(block, reference), "the registry has none"
                except OpsError as error:
                    away = error.message
            here = _inspected(client, reference)
            digest = digest or _digest_of(here, block.repository(role))
            if not digest and not here:
                raise OpsError(
                    f"there is no image {reference}: not on the engine, and {away}",
                    "build it (build-images with push), or correct the version",
                )
            found.append(Wanted(role, block.name_of(role), reference, digest, str(here.get("Id", ""))))
    return found


def _inspected(client: Any, image: str) -> Mapping[str, Any]:
    """A local image, {} where there is none."""
    try:
        found: Mapping[str, Any] = client.api.inspect_image(image)
        return found
    except docker.errors.ImageNotFound:
        return {}


def _digest_of(image: Mapping[str, Any], repository: str) -> str:
    """Under which a registry has a local image, "" where it was neither pulled nor pushed."""
    named = (one.partition("@") for one in image.get("RepoDigests") or [])
    return next((digest for name, _, digest in named if name == repository), "")


@action(idempotent=True)
def pull_images(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> list[Wanted]:
    """The planned images, by their digests: what the tag means by now does not matter. It is set to them here.

    Raises:
        OpsError: one cannot be pulled.
    """
    pulled = []
    with engine(block.host, seconds=SILENT_SECONDS) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            repository, _, tag = one.reference.rpartition(":")
            if one.digest and not _inspected(client, one.image):
                for part in client.api.pull(
                    repository, tag=one.digest, stream=True, decode=True, auth_config=block.login(one.reference)
                ):
                    if "error" in part:
                        raise OpsError(f"{one.image} cannot be pulled: {part['error']}", "check the registry")
            if one.digest:
                client.api.tag(one.image, repository, tag)
            found = str(client.api.inspect_image(one.image)["Id"])
            pulled.append(Wanted(one.role, one.name, one.reference, one.digest, found))
    return pulled


@action(idempotent=True)
def make_containers(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> dict[str, str]:
    """Make each container beside the one that runs, not started: whatever is wrong with it is found now. Returns role →
    the new one's id.

    Raises:
        OpsError: the engine refuses one, or its env_file cannot be read.
    """
    made = {}
    with engine(block.host) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            if left := find(client, upcoming(one.name)):  # of a run that was killed
                left.remove(force=True)
            described = options(block.container(one.role))
            made[one.role] = client.containers.create(one.image, name=upcoming(one.name), detach=True, **described).id
    return made


@action(idempotent=True)
def swap_containers(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> None:
    """Stop the old one and set it aside, start the new one in its place. Where a killed run had set one aside, that one
    is still the way back, and what stands in its place has not proven anything.

    Raises:
        OpsError: the engine refuses something, e.g. to start it.
    """
    with engine(block.host, seconds=STOP_SECONDS) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            if following := find(client, upcoming(one.name)):  # else it is in its place already
                if current := find(client, one.name):
                    current.stop()
                    if find(client, aside(one.name)):
                        current.remove()
                    else:
                        _never_start(current)
                        current.rename(aside(one.name))
                following.rename(one.name)
            client.containers.get(one.name).start()


@action(idempotent=True)
def take_back(permit: Permit, block: Docker, wanted: Sequence[Wanted], made: Mapping[str, str]) -> list[str]:
    """Put what was set aside into its place again, and the new one aside in turn: stopped, with its log. Returns the
    roles that there was nothing to go back to for: those where nothing but the new one (`made`) is there.

    Raises:
        OpsError: the engine refuses something.
    """
    without = []
    with engine(block.host, seconds=STOP_SECONDS) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            if left := find(client, upcoming(one.name)):
                left.remove(force=True)
            before, current = find(client, aside(one.name)), find(client, one.name)
            if before:
                if current:
                    _set_failed_aside(client, current, one.name)
                before.update(restart_policy=options(block.container(one.role))["restart_policy"])
                before.rename(one.name)
            elif not current or current.id == made.get(one.role):
                without.append(one.role)
                continue
            client.containers.get(one.name).start()
    return without


def _set_failed_aside(client: Any, current: Any, name: str) -> None:
    if left := find(client, failed(name)):  # of a run that was killed
        left.remove(force=True)
    _never_start(current)
    current.stop(timeout=0)
    current.rename(failed(name))


def _never_start(container: Any) -> None:
    """An engine that starts again would start a container whose policy is `always` next to its successor."""
    container.update(restart_policy={"Name": "no"})


@action(idempotent=True)
def remove_failed(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> None:
    """Remove containers that were not healthy, once their logs are in the report. Their images and volumes stay."""
    with engine(block.host) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            if left := find(client, failed(one.name)):
                left.remove(force=True)


@action(idempotent=True)
def remove_aside(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> None:
    """What was before goes: its successor has proven itself. Its image stays, as do its volumes."""
    with engine(block.host) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            for name in (aside(one.name), failed(one.name)):
                if left := find(client, name):
                    left.remove()
