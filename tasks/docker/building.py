"""Build images from a checkout with labels of their origin, tag them, push them, read their digests."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import docker.errors

from blocks.docker import Docker, engine, words
from runbook.errors import OpsError, Unreachable
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.log import logger
from runbook.masking import masked
from tasks.docker.source import BuildSource

# Between two lines of output: a build step can be silent for a long time.
SILENT_SECONDS = 1800
KEPT_LINES, SHOWN_LINES = 400, 5
# https://specs.opencontainers.org/image-spec/annotations/
REVISION = "org.opencontainers.image.revision"
VERSION = "org.opencontainers.image.version"
CREATED = "org.opencontainers.image.created"
SOURCE = "org.opencontainers.image.source"
PUSH = "push"


@dataclass(frozen=True)
class BuiltImage:
    """A built image; `references`: its tags, the version first."""

    role: str
    id: str
    references: tuple[str, ...]
    bytes: int
    log: str


class BuildFailed(OpsError):
    """A build that failed; `log`: the end of its output."""

    def __init__(self, message: str, log: str) -> None:
        self.log = log
        lines = " / ".join(line for line in log.splitlines() if line.strip())
        super().__init__(message, f"its last lines: {lines[-600:]}")


def check_version(version: str) -> None:
    """Raises OpsError if the version is not a valid tag."""
    if not version:
        raise OpsError("no version is given", "enter a version, such as v1.2.3")
    if not re.fullmatch(r"\w[\w.-]{0,127}", version, re.ASCII):
        raise OpsError(f"“{version[:40]}” is no version", "use letters, digits, “_”, “.” and “-”, such as v1.2.3")


def labels(version: str, source: BuildSource) -> dict[str, str]:
    """The labels that state an image's origin."""
    revision = source.revision + ("-dirty" if source.dirty else "")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {REVISION: revision, VERSION: version, CREATED: created, SOURCE: source.origin}


@probe
def read_labels(host: str, reference: str) -> Mapping[str, str] | None:
    """The labels of a local image; None if there is none of that name.

    Raises:
        Unreachable: the engine does not answer.
    """
    with engine(host) as client:
        try:
            return dict((client.api.inspect_image(reference).get("Config") or {}).get("Labels") or {})
        except docker.errors.ImageNotFound:
            return None


@probe
def read_pushed(host: str, reference: str) -> list[str]:
    """The digests of a local image in registries, from its pushes and pulls.

    Raises:
        Unreachable: the engine does not answer.
    """
    with engine(host) as client:
        return [one.rpartition("@")[2] for one in client.api.inspect_image(reference).get("RepoDigests") or []]


@probe
def read_digest(block: Docker, reference: str) -> str:
    """The digest of an image in its registry, "" if the registry has none of that name.

    Raises:
        Unreachable: the registry does not answer.
        OpsError: it refuses the login.
    """
    with engine(block.host) as client:
        try:
            found = client.api.inspect_distribution(reference, auth_config=block.login(reference))
        except docker.errors.APIError as error:
            said = words(error)
            if "manifest unknown" in said or "not found" in said.lower():
                return ""
            if "unauthorized" in said or "denied" in said:
                hint = "check username and password under [docker]"
                raise OpsError(f"the registry refuses {reference}: {said}", hint) from None
            hint = "start it, or correct registry under [docker]"
            raise Unreachable(f"the registry does not answer for {reference}: {said}", hint) from None
        return str(found["Descriptor"]["digest"])


@action(idempotent=True)
def build_image(block: Docker, role: str, source: BuildSource, version: str, *, trial: bool = False) -> BuiltImage:
    """Build a role's image from its Dockerfile; tag it with the version and the commit. `trial`: pull its base images
    first, and do not set the commit's tag, which can belong to a release.

    Raises:
        BuildFailed: a step failed.
        OpsError: the Dockerfile does not exist.
    """
    one, repository = block.container(role), block.repository(role)
    context = source.directory / one.context
    dockerfile = source.directory / one.dockerfile
    if not one.dockerfile or not dockerfile.is_file():
        raise OpsError(f"{role} has no Dockerfile {one.dockerfile}", f"correct it under [docker.containers.{role}]")
    lines = deque[str](maxlen=KEPT_LINES)
    with engine(block.host, seconds=SILENT_SECONDS) as client:
        stream = client.api.build(
            path=str(context),
            dockerfile=str(dockerfile),
            tag=f"{repository}:{version}",
            rm=True,
            forcerm=True,
            labels=labels(version, source),
            decode=True,
            pull=trial,
        )
        _follow(role, stream, lines)
        tags = (version,) if trial else (version, source.short)
        for tag in tags[1:]:
            client.api.tag(f"{repository}:{version}", repository, tag)
        found = client.api.inspect_image(f"{repository}:{version}")
    logger().info("image of %s built: %s", role, found["Id"])
    references = tuple(f"{repository}:{tag}" for tag in tags)
    return BuiltImage(role, found["Id"], references, int(found["Size"]), "\n".join(lines))


def _follow(role: str, stream: Iterable[Mapping[str, Any]], lines: deque[str]) -> None:
    for part in stream:
        lines += masked(str(part.get("stream") or part.get("status") or "")).splitlines()
        if "error" in part:
            raise BuildFailed(
                f"{role} does not build: {masked(str(part['error']))}", "\n".join(list(lines)[-SHOWN_LINES:])
            )


@action(of=lambda reference: Act(PUSH, reference), idempotent=True)
def push_image(block: Docker, reference: str) -> str:
    """Push one tag; returns its digest, read back from the registry.

    Raises:
        OpsError: the registry refuses it, or does not answer.
    """
    repository, _, tag = reference.rpartition(":")
    pushed = ""
    with engine(block.host, seconds=SILENT_SECONDS) as client:
        for part in client.api.push(repository, tag=tag, stream=True, decode=True, auth_config=block.login(reference)):
            if "error" in part:
                raise OpsError(f"{reference} was not pushed: {part['error']}", "check the registry and its login")
            pushed = (part.get("aux") or {}).get("Digest") or pushed
    there = read_digest.work(block, reference)
    if not pushed or there != pushed:
        raise OpsError(
            f"{reference} was pushed as {pushed or 'nothing'}, but the registry has {there or 'none'}",
            "push it again; find out who else pushes that tag",
        )
    return there
