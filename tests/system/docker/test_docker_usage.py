"""check_docker_usage on a real engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flows.infrastructure.images.resources import review_resources
from flows.infrastructure.images.usage import check_docker_usage
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.fixtures.engine import NAME, Engine

pytestmark = pytest.mark.system

CONTAINERS = """
[docker.containers.backend]
image = "grc-backend"
name = "{prefix}-backend"
memory = "64m"
reservation = "32m"
cpus = 0.5
"""
LIMITS = {"mem_limit": "64m", "mem_reservation": "32m", "nano_cpus": 500_000_000}


def found(report: Report, name: str) -> str:
    """A finding's status and value."""
    (finding,) = [one for one in report.findings if one.name == name]
    return f"{finding.status}: {finding.value}"


def test_a_container_within_its_limits_is_well(engine: Engine, environment: Callable[[str], None]) -> None:
    environment(CONTAINERS.format(prefix=engine.prefix))
    engine.run("backend", **LIMITS)
    report = check_docker_usage.fn(NAME)
    assert report.status in (Status.OK, Status.WARN), report.sentence()  # this machine's disk may be full
    assert found(report, f"container {engine.prefix}-backend") == "OK: running"
    assert found(report, f"limits of {engine.prefix}-backend").startswith("OK: memory 67.1 MB")
    assert found(report, "containers without a limit") == "OK: none"
    assert found(report, "stopped containers") == "OK: none"
    (table,) = [one for one in report.evidence if one.name == "Running containers"]
    assert [row[0] for row in table.rows] == [f"{engine.prefix}-backend"]


def test_what_is_wrong_is_found(engine: Engine, environment: Callable[[str], None]) -> None:
    environment(CONTAINERS.format(prefix=engine.prefix))
    engine.run("backend", **LIMITS | {"mem_limit": "128m"})
    engine.run("greedy", "sh", "-c", "while true; do true; done")
    ended = engine.run("ended", "sh", "-c", "dd if=/dev/zero of=/file bs=1000 count=300; exit 3")
    assert ended.wait()["StatusCode"] == 3
    volume = engine.client.volumes.create(f"{engine.prefix}-left")
    network = engine.client.networks.create(f"{engine.prefix}-net", driver="bridge")
    engine.image("old", "LABEL a=1")
    nameless = engine.client.images.get(engine.image("nameless", "LABEL a=2")).id
    engine.client.api.tag(engine.client.images.get(f"{engine.prefix}-old:1").id, f"{engine.prefix}-nameless", "1")
    try:
        report = check_docker_usage.fn(NAME)
    finally:
        volume.remove()
        network.remove()
        engine.client.images.remove(nameless)
    assert report.status is Status.WARN
    assert found(report, f"limits of {engine.prefix}-backend").startswith("WARN: memory 134.2 MB")
    assert found(report, "containers without a limit") == f"WARN: {engine.prefix}-greedy"
    assert found(report, "stopped containers").startswith("WARN: 1, 30")
    assert f"{engine.prefix}-left" in found(report, "volumes without a mount")
    assert f"{engine.prefix}-net" in found(report, "networks without containers")
    assert found(report, "images without a tag").startswith("WARN: 1")
    (table,) = [one for one in report.evidence if one.name == "Running containers"]
    (greedy,) = [row for row in table.rows if row[0].endswith("greedy")]
    assert float(greedy[2]) > 0.02, "it takes what it gets"
    assert greedy[3] == "no limit"


def test_a_container_near_its_limit_and_one_that_is_missing_are_critical(
    engine: Engine, environment: Callable[[str], None]
) -> None:
    environment(CONTAINERS.format(prefix=engine.prefix))
    with pytest.raises(RunbookFailed, match="backend: missing"):
        check_docker_usage.fn(NAME)
    full = "dd if=/dev/zero of=/dev/null bs=46M count=1000000"
    greedy = engine.run("backend", "sh", "-c", full, mem_limit="48m", mem_reservation="32m", nano_cpus=500_000_000)
    until(
        lambda: greedy.stats(stream=False)["memory_stats"].get("usage", 0) >= 46 << 20,
        what="that it takes its memory",
        seconds=120,
    )
    with pytest.raises(RunbookFailed, match=r"docker.memory.used_ratio \(.*-backend, limit 50.3 MB\): (9[5-9]|100)"):
        check_docker_usage.fn(NAME)


def test_a_review_shows_what_does_nothing_and_fills_the_cleaning_in(
    engine: Engine, environment: Callable[[str], None]
) -> None:
    environment("")
    engine.run("idle", mem_limit="1g")
    engine.run("busy", "sh", "-c", "while true; do true; done")
    volume = engine.client.volumes.create(f"{engine.prefix}-left")
    try:
        report = review_resources.fn(NAME, samples=2)
    finally:
        volume.remove()
    assert found(report, "idle containers") == f"WARN: {engine.prefix}-idle"
    assert f"{engine.prefix}-idle (" in found(report, "containers with too much memory")
    assert found(report, "unused parts of Docker").startswith("WARN: 1, ")
    (unused,) = [one for one in report.findings if one.name == "unused parts of Docker"]
    assert unused.follow[0].parameters == {"volumes": [f"{engine.prefix}-left"]}
