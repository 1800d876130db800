"""A version of a container in the place of another, with the way back.

The new one is made beside the old one (`name-next`), which is stopped only then and kept (`name-before`) until the new
one has proven itself. Each step may be done again after a death: what is there says how far the last run came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import docker.errors

from blocks.docker import Docker, engine
from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.permit import Act, Permit
from tasks.docker.building import SILENT_SECONDS, read_digest
from tasks.docker.deployed import aside, find
from tasks.docker.described import options

DEPLOY = "deploy"
STOP_SECONDS = 150


@dataclass(frozen=True)
class Wanted:
    """The image that a role shall have. `digest` is the registry's; `image_id` is the local one's, "" before it was
    pulled."""

    role: str
    name: str
    reference: str
    digest: str
    image_id: str


def upcoming(name: str) -> str:
    """What a container is called until the one before it has stopped."""
    return f"{name}-next"


def act_of(wanted: Wanted) -> Act:
    """What has to be permitted."""
    return Act(DEPLOY, f"{wanted.reference} as {wanted.name}")


@probe
def find_images(block: Docker, roles: Sequence[str], version: str) -> list[Wanted]:
    """The images of a version: in the registry, and here. A registry that is away is no obstacle where the image is
    here already: going back must work then.

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
            try:
                here = str(client.api.inspect_image(reference)["Id"])
            except docker.errors.ImageNotFound:
                here = ""
            if not digest and not here:
                raise OpsError(f"there is no image {reference}: not on the engine, and {away}",
                               "build it (build-images with push), or correct the version")  # fmt: skip
            found.append(Wanted(role, block.name_of(role), reference, digest, here))
    return found


@action(idempotent=True)
def pull_images(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those that the registry has, as it has them; the others are here.

    Raises:
        OpsError: one cannot be pulled, or is another one than the registry's.
    """
    pulled = []
    with engine(block.host, seconds=SILENT_SECONDS) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            repository, _, tag = one.reference.rpartition(":")
            if one.digest:
                for part in client.api.pull(
                    repository, tag=tag, stream=True, decode=True, auth_config=block.login(one.reference)
                ):
                    if "error" in part:
                        raise OpsError(f"{one.reference} cannot be pulled: {part['error']}", "look at the registry")
            found = client.api.inspect_image(one.reference)
            known = [digest.rpartition("@")[2] for digest in found.get("RepoDigests") or []]
            if one.digest and one.digest not in known:
                raise OpsError(f"{one.reference} was {one.digest} when it was planned and is {known} now",
                               "look who pushed to that tag, then plan again")  # fmt: skip
            pulled.append(Wanted(one.role, one.name, one.reference, one.digest, str(found["Id"])))
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
            made[one.role] = client.containers.create(
                one.image_id, name=upcoming(one.name), detach=True, **described
            ).id
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
                        current.rename(aside(one.name))
                following.rename(one.name)
            client.containers.get(one.name).start()


@action(idempotent=True)
def take_back(permit: Permit, block: Docker, wanted: Sequence[Wanted], made: Mapping[str, str]) -> list[str]:
    """Put what was set aside into its place again; returns the roles that there was nothing to go back to for: those
    where nothing but the new one (`made`) is there.

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
                    current.remove(force=True)
                before.rename(one.name)
            elif not current or current.id == made.get(one.role):
                without.append(one.role)
                continue
            client.containers.get(one.name).start()
    return without


@action(idempotent=True)
def remove_aside(permit: Permit, block: Docker, wanted: Sequence[Wanted]) -> None:
    """What was before goes: its successor has proven itself. Its image stays, as do its volumes."""
    with engine(block.host) as client:
        for one in wanted:
            permit.require(DEPLOY, act_of(one).target)
            if before := find(client, aside(one.name)):
                before.remove()
