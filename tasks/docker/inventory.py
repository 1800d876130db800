"""The contents of an engine: containers, images, networks, volumes, build cache, with bytes and age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import docker.errors

from blocks.docker import engine
from runbook.kinds import probe

# The engine adds up the files of every container and volume: https://docs.docker.com/reference/api/engine/ (df)
COUNT_SECONDS = 600
STOPPED = ("exited", "created", "dead")
PREDEFINED = ("bridge", "host", "none", "ingress", "docker_gwbridge")


@dataclass(frozen=True)
class ContainerLimits:
    """A container's limits: bytes of memory, bytes of memory reservation, CPUs; 0: no limit."""

    memory: int
    reservation: int
    cpus: float


@dataclass(frozen=True)
class SeenContainer:
    """A container. `since`: when it stopped, or its start if it runs. `bytes`: its writable layer."""

    id: str
    name: str
    image: str
    image_id: str
    state: str
    since: datetime
    bytes: int
    labels: Mapping[str, str]
    networks: tuple[str, ...]
    volumes: tuple[str, ...]
    limits: ContainerLimits
    exit_code: int
    restarts: int
    out_of_memory: bool
    health: str

    @property
    def stopped(self) -> bool:
        """Whether it neither runs nor starts."""
        return self.state in STOPPED


@dataclass(frozen=True)
class SeenImage:
    """An image. `since`: its build, or its last local tag if later. `bytes`: not shared with other images."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    since: datetime
    bytes: int
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its first tag, or its short id."""
        return self.tags[0] if self.tags else short(self.id)


@dataclass(frozen=True)
class SeenNetwork:
    """A user-defined network."""

    id: str
    name: str
    since: datetime
    labels: Mapping[str, str]


@dataclass(frozen=True)
class SeenVolume:
    """A volume; `bytes` is -1 if its driver does not report it."""

    name: str
    since: datetime
    bytes: int
    labels: Mapping[str, str]


@dataclass(frozen=True)
class SeenCache:
    """A record of BuildKit's cache."""

    id: str
    bytes: int
    in_use: bool
    since: datetime


@dataclass(frozen=True)
class Inventory:
    """An engine at one moment."""

    version: str
    root: str
    processors: int
    memory: int
    layers_bytes: int
    containers: tuple[SeenContainer, ...]
    images: tuple[SeenImage, ...]
    networks: tuple[SeenNetwork, ...]
    volumes: tuple[SeenVolume, ...]
    cache: tuple[SeenCache, ...]

    @property
    def parts(self) -> int:
        """The number of objects that could be removed."""
        return sum(map(len, (self.containers, self.images, self.networks, self.volumes, self.cache)))

    def dangling_networks(self) -> list[SeenNetwork]:
        """Networks without any container. A stopped container counts: it cannot start without its network."""
        used = {network for one in self.containers for network in one.networks}
        return [one for one in self.networks if one.id not in used]

    def dangling_volumes(self) -> list[SeenVolume]:
        """Volumes that no container mounts."""
        used = {volume for one in self.containers for volume in one.volumes}
        return [one for one in self.volumes if one.name not in used]

    def dangling_images(self) -> list[SeenImage]:
        """Images without a tag that no container uses."""
        used = {one.image_id for one in self.containers}
        return [one for one in self.images if not one.tags and one.id not in used]


@probe
def read_inventory(host: str) -> Inventory:
    """Read what `docker system df -v`, `docker network ls` and `docker inspect` show (§4.2).

    Raises:
        Unreachable: the engine does not answer.
        OpsError: it refuses.
    """
    with engine(host, seconds=COUNT_SECONDS) as client:
        info, counted = client.info(), client.api.df()
        networks = [one for one in client.api.networks() if one["Name"] not in PREDEFINED]
        containers = [
            _container(details, one)
            for one in counted.get("Containers") or []
            if (details := _inspect(client.api.inspect_container, one["Id"]))
        ]
        images = [
            _image(details, one)
            for one in counted.get("Images") or []
            if (details := _inspect(client.api.inspect_image, one["Id"]))
        ]
        return Inventory(
            str(info["ServerVersion"]),
            str(info["DockerRootDir"]),
            int(info["NCPU"]),
            int(info["MemTotal"]),
            int(counted.get("LayersSize") or 0),
            tuple(sorted(containers, key=lambda one: one.name)),
            tuple(sorted(images, key=lambda one: one.name)),
            tuple(SeenNetwork(n["Id"], n["Name"], moment(n["Created"]), n.get("Labels") or {}) for n in networks),
            tuple(_volume(one) for one in counted.get("Volumes") or []),
            tuple(_cache(one) for one in counted.get("BuildCache") or []),
        )


def short(identity: str) -> str:
    """The short id, as in `docker ps`."""
    return identity.removeprefix("sha256:")[:12]


def moment(text: str) -> datetime:
    """Parse the engine's time, with nanoseconds; its “never” is the year 1."""
    found = datetime.fromisoformat(text) if text else datetime(1, 1, 1, tzinfo=UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _inspect(ask: Any, identity: str) -> dict[str, Any]:
    try:
        return dict(ask(identity))
    except docker.errors.NotFound:  # removed meanwhile
        return {}


def _container(details: dict[str, Any], counted: dict[str, Any]) -> SeenContainer:
    state, config = details["State"], details["Config"]
    stopped = state["Status"] in STOPPED
    since = max(moment(state["FinishedAt"]) if stopped else moment(state["StartedAt"]), moment(details["Created"]))
    networks = (details["NetworkSettings"].get("Networks") or {}).values()
    return SeenContainer(
        id=details["Id"],
        name=details["Name"].lstrip("/"),
        image=config["Image"],
        image_id=details["Image"],
        state=state["Status"],
        since=since,
        bytes=int(counted.get("SizeRw") or 0),
        labels=config.get("Labels") or {},
        networks=tuple(one["NetworkID"] for one in networks if one.get("NetworkID")),
        volumes=tuple(one["Name"] for one in details.get("Mounts") or [] if one["Type"] == "volume"),
        limits=limits_of(details["HostConfig"]),
        exit_code=int(state["ExitCode"]),
        restarts=int(details.get("RestartCount") or 0),
        out_of_memory=bool(state["OOMKilled"]),
        health=(state.get("Health") or {}).get("Status", ""),
    )


def limits_of(host: Mapping[str, Any]) -> ContainerLimits:
    """The limits of a container's HostConfig; `--cpus` and `--cpu-quota` are two names of one limit."""
    cpus = (host.get("NanoCpus") or 0) / 1e9
    if not cpus and (host.get("CpuQuota") or 0) > 0:
        cpus = host["CpuQuota"] / (host.get("CpuPeriod") or 100_000)
    return ContainerLimits(int(host.get("Memory") or 0), int(host.get("MemoryReservation") or 0), cpus)


def _image(details: dict[str, Any], counted: dict[str, Any]) -> SeenImage:
    shared = max(int(counted.get("SharedSize") or 0), 0)
    tagged = (details.get("Metadata") or {}).get("LastTagTime") or ""
    return SeenImage(
        id=details["Id"],
        tags=tuple(sorted(tag for tag in details.get("RepoTags") or [] if not tag.startswith("<none>"))),
        digests=tuple(details.get("RepoDigests") or []),
        since=max(moment(details.get("Created") or ""), moment(tagged)),
        bytes=max(int(counted["Size"]) - shared, 0),
        labels=(details.get("Config") or {}).get("Labels") or {},
    )


def _volume(counted: dict[str, Any]) -> SeenVolume:
    used = counted.get("UsageData") or {}
    labels = counted.get("Labels") or {}
    return SeenVolume(counted["Name"], moment(counted.get("CreatedAt") or ""), int(used.get("Size", -1)), labels)


def _cache(counted: dict[str, Any]) -> SeenCache:
    since = moment(counted.get("LastUsedAt") or counted.get("CreatedAt") or "")
    return SeenCache(counted["ID"], int(counted["Size"]), bool(counted["InUse"]), since)
