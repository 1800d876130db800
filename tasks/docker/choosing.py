"""Choose the unused objects to remove, from an inventory alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from runbook.errors import OpsError
from tasks.docker.inventory import Inventory, SeenContainer, SeenImage, short

Kind = Literal["container", "image", "network", "build cache", "volume"]


@dataclass(frozen=True)
class Doomed:
    """An object to remove. `id` and `since` identify it: a replaced object is not removed. `bytes`: freed at least."""

    kind: Kind
    id: str
    name: str
    since: datetime
    bytes: int
    why: str


@dataclass(frozen=True)
class CleanupSelection:
    """What can be removed: these kinds, older than `before`, only with `label` (a key, or key=value); never a container
    in `kept_names`, never the newest `keep_tags` images of a repository."""

    kinds: Collection[Kind]
    before: datetime
    keep_tags: int
    label: str = ""
    kept_names: Collection[str] = field(default=())
    volumes: Collection[str] = field(default=())


def choose(found: Inventory, wanted: CleanupSelection) -> list[Doomed]:
    """The objects in the order of their removal: containers first, because they use the others.

    Raises:
        OpsError: a named volume does not exist, or is mounted.
    """
    containers = [one for one in found.containers if "container" in wanted.kinds and _is_removable(one, wanted)]
    chosen = [
        Doomed("container", one.id, one.name, one.since, one.bytes, f"{one.state}, of {one.image}")
        for one in containers
    ]
    kept = [one for one in found.containers if one not in containers]
    if "image" in wanted.kinds:
        chosen += _images(found, wanted, {one.image_id for one in kept})
    if "network" in wanted.kinds:
        used = {network for one in kept for network in one.networks}
        chosen += [
            Doomed("network", one.id, one.name, one.since, 0, "no container uses it")
            for one in found.networks
            if one.id not in used and one.since < wanted.before and _labelled(one.labels, wanted.label)
        ]
    idle = [one for one in found.cache if not one.in_use and one.since < wanted.before]
    if "build cache" in wanted.kinds and idle and not wanted.label:
        newest = max(one.since for one in idle)
        size = sum(one.bytes for one in idle)
        chosen.append(Doomed("build cache", "", f"{len(idle)} records", newest, size, "not in use"))
    return chosen + _volumes(found, wanted, {volume for one in kept for volume in one.volumes})


def kept_tags(images: Collection[SeenImage], keep: int) -> set[str]:
    """The tags of each repository's newest `keep` images; a floating tag (`latest`) counts with its image."""
    repositories = defaultdict[str, list[tuple[SeenImage, str]]](list)
    for image in images:
        for tag in image.tags:
            repositories[tag.rpartition(":")[0]].append((image, tag))
    kept = set[str]()
    for tagged in repositories.values():
        newest = sorted({image.id: image for image, _ in tagged}.values(), key=lambda one: (one.since, one.id))
        ids = {image.id for image in newest[-keep:]}
        kept |= {tag for image, tag in tagged if image.id in ids}
    return kept


def _is_removable(one: SeenContainer, wanted: CleanupSelection) -> bool:
    return (
        one.stopped
        and one.since < wanted.before
        and one.name not in wanted.kept_names
        and _labelled(one.labels, wanted.label)
    )


def _images(found: Inventory, wanted: CleanupSelection, used: Collection[str]) -> list[Doomed]:
    """By tag, so that an image with another kept tag is kept; an image without a tag by its id."""
    kept, chosen = kept_tags(found.images, wanted.keep_tags), list[Doomed]()
    for one in found.images:
        if one.id in used or one.since >= wanted.before or not _labelled(one.labels, wanted.label):
            continue
        if not one.tags:
            chosen.append(Doomed("image", one.id, short(one.id), one.since, one.bytes, "has no tag"))
        old = [tag for tag in one.tags if tag not in kept]
        for tag in old:
            last = tag == old[-1] and len(old) == len(one.tags)
            why = f"not of the newest {wanted.keep_tags} of its repository, and no container uses it"
            chosen.append(Doomed("image", one.id, tag, one.since, one.bytes if last else 0, why))
    return chosen


def _volumes(found: Inventory, wanted: CleanupSelection, used: Collection[str]) -> list[Doomed]:
    there = {one.name: one for one in found.volumes}
    for name in wanted.volumes:
        if name not in there:
            raise OpsError(f"there is no volume {name[:80]}", "see check-docker-usage for the names of volumes")
        if name in used:
            holders = [one.name for one in found.containers if name in one.volumes]
            raise OpsError(
                f"the volume {name} is mounted by {', '.join(holders)}",
                "leave it out, or remove these containers first",
            )
    named = [there[name] for name in dict.fromkeys(wanted.volumes)]
    return [Doomed("volume", one.name, one.name, one.since, max(one.bytes, 0), "named") for one in named]


def _labelled(labels: Mapping[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return not wanted or (key in labels and (not equals or labels[key] == value))
