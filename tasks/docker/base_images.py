"""The images that others are built from: here, and in the registry; and a new image, tried out."""

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
    """A base of some roles. `built`: when the one here was built, None where it is not here. `theirs`: the registry's
    digest, "" where it has none or did not answer: then `away` says why."""

    base: Base
    roles: tuple[str, ...]
    dockerfile: str
    built: datetime | None
    ours: tuple[str, ...]
    theirs: str
    away: str

    @property
    def pinned(self) -> str:
        """As a FROM line pins it: to the registry's digest of now, or to the one that the image here was pulled by; ""
        where neither is known."""
        digest = self.theirs or next(iter(self.ours), "")
        return f"{self.base.named}@{digest}" if digest else ""

    @property
    def drifted(self) -> bool:
        """The name means another image in the registry than it does here, or than the pinned digest."""
        known = (self.base.digest,) if self.base.digest else self.ours
        return bool(self.theirs and known) and self.theirs not in known


def bases_of(block: Docker, checkout: Path) -> dict[tuple[str, Base], tuple[str, ...]]:
    """(Dockerfile, base) → the roles that are built from it.

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
    """Every base of the application's images.

    Raises:
        Unreachable: the engine does not answer. A registry that does not is in `away`.
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
                away = "" if theirs else "the registry has none of that name"
            except OpsError as error:
                away = error.message
            found.append(BaseImage(base, roles, dockerfile, built, ours, theirs, away))
    return found


@probe
def read_base_digests(block: Docker, checkout: Path, roles: Collection[str]) -> dict[str, str]:
    """What each base of some roles' images is here now, right after a build: FROM's text → name@digest, "" where no
    registry gave it a digest.

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
    """Run a command in a new container of an image, without a network, and remove it; returns what it printed.

    Raises:
        OpsError: it exits with something else than 0, or does not end.
    """
    with engine(block.host) as client:
        container = client.containers.create(reference, list(command), network_mode="none", detach=True)
        try:
            container.start()
            try:
                code = container.wait(timeout=TEST_SECONDS)["StatusCode"]
            except (ReadTimeout, NotConnected):  # the SDK says so with either; not Unreachable: it is not tried again
                raise OpsError(
                    f"the test of {reference} did not end within {TEST_SECONDS} s",
                    "look at what it waits for: it has no network; the branch is kept",
                ) from None
            said = masked(container.logs(tail=50).decode(errors="replace"))
        finally:
            container.remove(force=True)
    if code:
        raise OpsError(
            f"the test of {reference} exits {code}: {' / '.join(said.splitlines()[-3:])[:400]}",
            "look at what it says; the branch is kept",
        )
    return said


@action(idempotent=True)
def forget_image(host: str, references: Sequence[str]) -> None:
    """Take the names from an image that was built to be tried out."""
    with engine(host) as client:
        for reference in references:
            try:
                client.api.remove_image(reference)
            except docker.errors.ImageNotFound:
                continue
