"""What may go: chosen from an inventory without an engine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from runbook.errors import OpsError
from tasks.docker.choosing import CleanupSelection, Doomed, choose, kept_tags
from tasks.docker.inventory import (
    ContainerLimits,
    Inventory,
    SeenCache,
    SeenContainer,
    SeenImage,
    SeenNetwork,
    SeenVolume,
    limits_of,
    moment,
)
from tasks.docker.usage import use_of

NOW = datetime(2026, 2, 15, 12, tzinfo=UTC)
ALL = ("container", "image", "network", "build cache")


def ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


def container(name: str, image: str = "i0", state: str = "exited", hours: float = 500, **more: Any) -> SeenContainer:
    given = {"networks": (), "volumes": (), "labels": {}, **more}
    return SeenContainer(
        f"id-{name}",
        name,
        image,
        image,
        state,
        ago(hours),
        10,
        limits=ContainerLimits(0, 0, 0),
        exit_code=0,
        restarts=0,
        out_of_memory=False,
        health="",
        **given,
    )


def image(identity: str, *tags: str, hours: float = 500) -> SeenImage:
    return SeenImage(identity, tags, (), ago(hours), 100, {})


def inventory(**held: Any) -> Inventory:
    nothing: dict[str, Any] = dict.fromkeys(("containers", "images", "networks", "volumes", "cache"), ())
    return Inventory("26", "/var/lib/docker", 2, 1000, 0, **nothing | held)


def wish(*kinds: Any, **more: Any) -> CleanupSelection:
    return CleanupSelection(**{"kinds": kinds or ALL, "before": ago(168), "keep_tags": 2, **more})


def names(chosen: list[Doomed]) -> list[str]:
    return [one.name for one in chosen]


def test_stopped_containers_go_but_not_young_ones_nor_what_runs_nor_the_application_s() -> None:
    held = inventory(
        containers=(
            container("old"),
            container("young", hours=1),
            container("runs", state="running"),
            container("paused", state="paused"),
            container("returns", state="restarting"),
            container("never", state="created"),
            container("backend"),
        )
    )
    assert names(choose(held, wish(kept_names={"backend"}))) == ["old", "never"]
    assert names(choose(held, wish("image", kept_names={"backend"}))) == []


def test_the_newest_images_of_each_repository_stay() -> None:
    images = [
        image("a", "app:1", hours=900),
        image("b", "app:2", "app:stable", hours=800),
        image("c", "app:3", "app:latest", hours=700),
        image("d", "reg:5000/app:1", hours=900),
        image("e", hours=600),
        image("f", "app:4", hours=600),
    ]
    assert kept_tags(images, 2) == {"app:3", "app:latest", "app:4", "reg:5000/app:1"}
    chosen = choose(inventory(images=tuple(images)), wish())
    assert names(chosen) == ["app:1", "app:2", "app:stable", "e"]
    assert [one.bytes for one in chosen] == [100, 0, 100, 100], "an image's bytes once"


def test_an_image_that_a_container_uses_stays_unless_that_container_goes() -> None:
    held = inventory(
        images=tuple(image(name, f"app:{name}", hours=900 - number) for number, name in enumerate("abcd")),
        containers=(container("old", image="a"), container("young", image="b", hours=1)),
    )
    assert names(choose(held, wish("container", "image"))) == ["old", "app:a"]
    assert names(choose(held, wish("image"))) == [], "a stopped container uses its image too"


def test_an_image_kept_under_another_name_gives_no_bytes() -> None:
    images = (image("a", "app:1", "mine:1", hours=900), image("b", "app:2"), image("c", "app:3"))
    (one,) = choose(inventory(images=images), wish())
    assert (one.name, one.bytes) == ("app:1", 0)


def test_a_network_of_a_stopped_container_stays() -> None:
    networks = tuple(
        SeenNetwork(name, name, ago(hours), {}) for name, hours in (("used", 500), ("free", 500), ("new", 1))
    )
    held = inventory(networks=networks, containers=(container("young", hours=1, networks=("used",)),))
    assert names(choose(held, wish())) == ["free"]


def test_volumes_go_by_name_only_and_never_mounted_ones() -> None:
    volumes = tuple(SeenVolume(name, ago(900), 7, {}) for name in ("data", "left"))
    held = inventory(volumes=volumes, containers=(container("db", state="running", volumes=("data",)),))
    assert choose(held, wish()) == []
    assert names(choose(held, wish(volumes=("left", "left")))) == ["left"]
    with pytest.raises(OpsError, match="mounted by db"):
        choose(held, wish(volumes=("data",)))
    with pytest.raises(OpsError, match="no volume dat"):
        choose(held, wish(volumes=("dat",)))


def test_the_build_cache_and_a_label() -> None:
    cache = (SeenCache("1", 5, False, ago(500)), SeenCache("2", 6, True, ago(500)), SeenCache("3", 7, False, ago(1)))
    held = inventory(cache=cache, containers=(container("a", labels={"ci": "yes"}), container("b")))
    assert [(one.name, one.bytes) for one in choose(held, wish())] == [("a", 10), ("b", 10), ("1 records", 5)]
    assert names(choose(held, wish(label="ci"))) == ["a"]
    assert names(choose(held, wish(label="ci=no"))) == []


def test_the_engine_s_times_and_limits() -> None:
    assert moment("2026-02-15T12:00:00.123456789Z").microsecond == 123456
    assert moment("0001-01-01T00:00:00Z").year == 1
    assert limits_of({"Memory": 5, "CpuQuota": 50_000, "CpuPeriod": 100_000}) == ContainerLimits(5, 0, 0.5)
    assert limits_of({"NanoCpus": 1_500_000_000, "MemoryReservation": 3}) == ContainerLimits(0, 3, 1.5)


def test_use_is_counted_as_the_client_does() -> None:
    stats = {
        "cpu_stats": {"cpu_usage": {"total_usage": 300}, "system_cpu_usage": 2000, "online_cpus": 4},
        "precpu_stats": {"cpu_usage": {"total_usage": 100}, "system_cpu_usage": 1000},
        "memory_stats": {"usage": 900, "stats": {"inactive_file": 200}},
    }
    use = use_of(stats)
    assert use
    assert (use.cpus, use.memory) == (0.8, 700)
    assert use_of({"cpu_stats": {}, "memory_stats": {}}) is None, "no numbers are not nothing"
