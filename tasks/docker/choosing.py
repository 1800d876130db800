"""What of an engine may go: chosen from an inventory, without the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from runbook.errors import OpsError
from tasks.docker.inventory import Inventory, SeenContainer, SeenImage, short

Kind = Literal["container", "image", "network", "build cache", "volume"]
CACHE = "not used since"


@dataclass(frozen=True)
class Doomed:
    """Something to remove. `id` and `since` are what it was when it was chosen: what is another one then is left alone.
    `bytes`: what comes free, at least."""

    kind: Kind
    id: str
    name: str
    since: datetime
    bytes: int
    why: str


@dataclass(frozen=True)
class Wish:
    """What may go: which kinds, what is older than `before`, only with `label` (a key, or key=value), never a container
    in `kept_names`, of each repository not the newest `keep_tags` images."""

    kinds: Collection[Kind]
    before: datetime
    keep_tags: int
    label: str = ""
    kept_names: Collection[str] = field(default=())
    volumes: Collection[str] = field(default=())


def choose(found: Inventory, wish: Wish) -> list[Doomed]:
    """In the order in which it is removed: containers first, for they hold the rest.

    Raises:
        OpsError: a volume that was named is not there, or is mounted.
    """
    containers = [one for one in found.containers if "container" in wish.kinds and _may_go(one, wish)]
    chosen = [
        Doomed("container", one.id, one.name, one.since, one.bytes, f"{one.state}, of {one.image}")
        for one in containers
    ]
    staying = [one for one in found.containers if one not in containers]
    if "image" in wish.kinds:
        chosen += _images(found, wish, {one.image_id for one in staying})
    if "network" in wish.kinds:
        used = {network for one in staying for network in one.networks}
        chosen += [
            Doomed("network", one.id, one.name, one.since, 0, "no container is on it")
            for one in found.networks
            if one.id not in used and one.since < wish.before and _labelled(one.labels, wish.label)
        ]
    idle = [one for one in found.cache if not one.in_use and one.since < wish.before]
    if "build cache" in wish.kinds and idle and not wish.label:
        newest = max(one.since for one in idle)
        size = sum(one.bytes for one in idle)
        chosen.append(Doomed("build cache", "", f"{len(idle)} records", newest, size, "not in use"))
    return chosen + _volumes(found, wish, {volume for one in staying for volume in one.volumes})


def kept_tags(images: Collection[SeenImage], keep: int) -> set[str]:
    """The tags of each repository's newest `keep` images: a floating tag (`latest`) counts with the image that it is
    on."""
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


def _may_go(one: SeenContainer, wish: Wish) -> bool:
    return (
        one.stopped
        and one.since < wish.before
        and one.name not in wish.kept_names
        and _labelled(one.labels, wish.label)
    )


def _images(found: Inventory, wish: Wish, used: Collection[str]) -> list[Doomed]:
    """By tag, so that an image which is kept under another name stays; without one, by id."""
    kept, chosen = kept_tags(found.images, wish.keep_tags), list[Doomed]()
    for one in found.images:
        if one.id in used or one.since >= wish.before or not _labelled(one.labels, wish.label):
            continue
        if not one.tags:
            chosen.append(Doomed("image", one.id, short(one.id), one.since, one.bytes, "has no name"))
        old = [tag for tag in one.tags if tag not in kept]
        for tag in old:
            last = tag == old[-1] and len(old) == len(one.tags)
            why = f"not of the newest {wish.keep_tags} of its repository, and no container uses it"
            chosen.append(Doomed("image", one.id, tag, one.since, one.bytes if last else 0, why))
    return chosen


def _volumes(found: Inventory, wish: Wish, used: Collection[str]) -> list[Doomed]:
    there = {one.name: one for one in found.volumes}
    for name in wish.volumes:
        if name not in there:
            raise OpsError(f"there is no volume {name[:80]}", "check-docker-usage shows their names")
        if name in used:
            holders = [one.name for one in found.containers if name in one.volumes]
            raise OpsError(
                f"the volume {name} is mounted by {', '.join(holders)}", "leave it out, or remove them first"
            )
    named = [there[name] for name in dict.fromkeys(wish.volumes)]
    return [Doomed("volume", one.name, one.name, one.since, max(one.bytes, 0), "named") for one in named]


def _labelled(labels: Mapping[str, str], wanted: str) -> bool:
    key, equals, value = wanted.partition("=")
    return not wanted or (key in labels and (not equals or labels[key] == value))
