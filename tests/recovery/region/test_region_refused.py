"""A failover of the region is refused where it would do harm: nothing is started, nobody is sent anywhere."""

from __future__ import annotations

import pytest

from flows.recovery.region.failover import region_failover
from lab import lifecycle
from runbook.errors import RunbookFailed
from runbook.wait import until
from tests.recovery.conftest import System


def go(system: System, **named: str) -> None:
    given = {"source": system.name, "fenced_by": "on-call, who is wrong", "confirm": f"{system.name}-dr", **named}
    region_failover.fn(f"{system.name}-dr", **given)  # type: ignore[arg-type]


def test_a_region_that_lives_is_not_replaced_be_it_attested_to_be_dead(system: System) -> None:
    region, before = system.lab.region(), system.untouched()
    with pytest.raises(RunbookFailed, match="is dead .*backend takes no connections: not true.*repair it there"):
        go(system)
    assert system.untouched() == before
    assert {row["running"] for row in region.status()["services"].values()} == {False}
    assert system.lab.endpoint() == system.lab.status()["application"]["url"]


def test_a_database_that_lives_is_enough(system: System) -> None:
    services, _ = lifecycle.existing(system.name)
    programs = ("grc-backend", "grc-frontend", "redis", "redis-replica")
    for program in programs:
        services.supervisor.stop(program)
    try:
        with pytest.raises(RunbookFailed, match=r"PostgreSQL \(postgres\) takes no connections: not true"):
            go(system)
    finally:
        services.supervisor.start("redis")
        until(system.redis_answers, what="Redis: first the master, else the Sentinels promote", seconds=120)
        for program in programs:
            services.supervisor.start(program)
    assert system.lab.endpoint() == system.lab.status()["application"]["url"]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"fenced_by": "yes"}, "“yes” does not begin with the name of a person"),
        ({"source": ""}, "no source was given"),
        ({"source": "nowhere"}, "no environment “nowhere”"),
        ({"backup": "backup_20000101_000000"}, "no backup “backup_20000101_000000”"),
        ({"backup": "app_20000101_000000"}, "is no backup of a database"),
    ],
)
def test_what_cannot_be_meant(system: System, named: dict[str, str], said: str) -> None:
    with pytest.raises(RunbookFailed, match=said):
        go(system, **named)


def test_not_where_users_are_sent_already(system: System) -> None:
    """The way round: it would put the past over what they write."""
    before = system.untouched()
    report = region_failover.fn(system.name, source=f"{system.name}-dr", confirm=system.name)
    assert "nothing was changed" in report.outcome
    assert system.untouched() == before
