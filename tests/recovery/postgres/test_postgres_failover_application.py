"""A planned switchover of the lab's own database, there and back: the application follows it, and answers."""

from __future__ import annotations

from blocks.config import toml
from flows.recovery.postgres.failover import postgres_failover
from runbook.report import Status
from tasks.application.connection_string import read_target
from tasks.application.health import smoke_check
from tests.recovery.conftest import System
from tests.recovery.drills.running import steady


def test_the_application_follows_there_and_back(system: System) -> None:
    steady(system)
    env = toml.environment(system.name)
    addresses = {f"{node.host}:{node.port}" for node in env.nodes()}
    before = read_target(env.application)
    (other,) = addresses - {before}
    for wanted, launch in ((other, postgres_failover.fn), (before, postgres_failover)):  # outside of Prefect, and in it
        report = launch(system.name, new_primary=wanted, confirm=system.name)
        assert report.status is Status.WARN, report.sentence()
        assert report.facts["acknowledged writes lost"].startswith("0 (proven")
        steady(system)  # as the next one wants it
        assert read_target(toml.environment(system.name).application) == wanted
        assert system.healthy()
        smoke = smoke_check(env.application)
        assert smoke.ok, smoke.detail
