"""Base images, on the engine and in the registry; and the test of a new image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import docker.errors
from requests.exceptions import ConnectionError as NotConnected
from requests.exceptions import ReadTimeout

from blocks.docker import Docker, engine
from runbook.errors import OpsError
from runbook.kinds import action, probe
from runbook.masking import masked
from tasks.docker.bases import Base, find_bases
from tasks.docker.building import read_digest
from tasks.docker.inventory import moment

TEST_SECONDS = 1800


@dataclass(frozen=True)
class BaseImage:
    """A base image of some roles. `built`: build time of the local image, None without one. `ours`: its digests.
    `theirs`: the registry's digest, "" without one; then `away` is the reason."""

    base: Base
    roles: tuple[str, ...]
    dockerfile: str
    built: datetime | None
    ours: tuple[str, ...]
    theirs: str
    away: str

    @property
    def pinned(self) -> str:
        """The image for a pinned FROM line: the registry's current digest, or the local image's; "" if neither is
        known."""
        digest = self.theirs or next(iter(self.ours), "")
        return f"{self.base.named}@{digest}" if digest else ""

    @property
    def drifted(self) -> bool:
        """Whether the registry's image differs from the local one, or from the pinned digest."""
        known = (self.base.digest,) if self.base.digest else self.ours
        return bool(self.theirs and known) and self.theirs not in known


def bases_of(block: Docker, checkout: Path) -> dict[tuple[str, Base], tuple[str, ...]]:
    """The roles that use each base: (Dockerfile, base) → roles.

    Raises:
        OpsError: a Dockerfile cannot be read, or no container has one.
    """
    found = dict[tuple[str, Base], tuple[str, ...]]()
    for role, one in block.containers.items():
        if not one.dockerfile:
            continue
        try:
            text = (checkout / one.dockerfile).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OpsError(
                f"{one.dockerfile} of {role} cannot be read: {type(error).__name__}",
                f"correct it under [docker.containers.{role}]",
            ) from None
        try:
            for base in find_bases(text):
                found[one.dockerfile, base] = (*found.get((one.dockerfile, base), ()), role)
        except OpsError as error:
            raise OpsError(f"{one.dockerfile}: {error.message}", error.hint) from None
    if not found:
        raise OpsError("no container has a dockerfile with a base image", "add dockerfile under [docker.containers]")
    return found


@probe
def read_base_images(block: Docker, checkout: Path) -> list[BaseImage]:
    """Read every base image of the application.

    Raises:
        Unreachable: the engine does not answer. (An unreachable registry is in `away`.)
        OpsError: a Dockerfile cannot be read.
    """
    found = []
    with engine(block.host) as client:
        for (dockerfile, base), roles in bases_of(block, checkout).items():
            built, ours = None, tuple[str, ...]()
            try:
                image = client.api.inspect_image(base.reference)
                built = moment(image.get("Created") or "")
                ours = tuple(one.rpartition("@")[2] for one in image.get("RepoDigests") or [])
            except docker.errors.ImageNotFound:
                pass
            theirs, away = "", ""
            try:
                theirs = read_digest.work(block, base.named)
                away = "" if theirs else "the registry has no image of that name"
            except OpsError as error:
                away = error.message
            found.append(BaseImage(base, roles, dockerfile, built, ours, theirs, away))
    return found


@probe
def read_base_digests(block: Docker, checkout: Path, roles: Collection[str]) -> dict[str, str]:
    """The bases of some roles' images right after a build: text of FROM → name@digest, "" if no digest is known.

    Raises:
        Unreachable: the engine does not answer.
        OpsError: a Dockerfile cannot be read.
    """
    found = dict[str, str]()
    with engine(block.host) as client:
        for (_, base), users in bases_of(block, checkout).items():
            if set(users) & set(roles):
                try:
                    digests = client.api.inspect_image(base.reference).get("RepoDigests") or []
                except docker.errors.ImageNotFound:
                    digests = []
                digest = base.digest or next((one.rpartition("@")[2] for one in digests), "")
                found[base.reference] = f"{base.named}@{digest}" if digest else ""
    return found


@action(idempotent=True)
def try_image(block: Docker, reference: str, command: Sequence[str]) -> str:
    """Run a command in a new container of an image, without a network; remove the container. Returns its output.

    Raises:
        OpsError: the exit code is not 0, or it does not end within TEST_SECONDS.
    """
    with engine(block.host) as client:
        container = client.containers.create(reference, list(command), network_mode="none", detach=True)
        try:
            container.start()
            try:
                code = container.wait(timeout=TEST_SECONDS)["StatusCode"]
            except (ReadTimeout, NotConnected):  # the SDK raises either; not Unreachable, which is retried
                raise OpsError(
                    f"the test of {reference} did not end within {TEST_SECONDS} s",
                    "check what it waits for: it has no network; the branch is kept",
                ) from None
            said = masked(container.logs(tail=50).decode(errors="replace"))
        finally:
            container.remove(force=True)
    if code:
        raise OpsError(
            f"the test of {reference} exits {code}: {' / '.join(said.splitlines()[-3:])[:400]}",
            "check its output; the branch is kept",
        )
    return said


@action(idempotent=True)
def forget_image(host: str, references: Sequence[str]) -> None:
    """Remove the tags of a trial image."""
    with engine(host) as client:
        for reference in references:
            try:
                client.api.remove_image(reference)
            except docker.errors.ImageNotFound:
                continue
