"""PostgreSQL failover, planned and unplanned, against real clusters: clients write all the time, and their own account
of what was acknowledged is compared with what the new primary has."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flows.recovery.postgres_failover import postgres_failover, rejoin_standby
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tests.clusters import NAME, Cluster


def fail_over(mode: Any = "planned", **parameters: Any) -> Report:
    """For real, and well."""
    return postgres_failover.fn(NAME, mode=mode, confirm=NAME, **parameters)


def rejoin(**parameters: Any) -> Report:
    """For real, and well."""
    return rejoin_standby.fn(NAME, confirm=NAME, **parameters)


def refused(mode: Any = "planned", **parameters: Any) -> Report:
    """The report of a run that must not begin."""
    with pytest.raises(RunbookFailed) as caught:
        postgres_failover.fn(NAME, mode=mode, **{"confirm": NAME, **parameters})
    return caught.value.report


def finding(report: Report, name: str) -> str:
    """The value and hint of the findings of that name."""
    return " | ".join(f"{found.status} {found.value} {found.hint}" for found in report.findings if name in found.name)


def found(cluster: Cluster, role: str) -> list[Any]:
    return cluster.sql(role, "SELECT id FROM writes")


def target(cluster: Cluster) -> str:
    text = (cluster.root / "opt" / "grc" / "backend" / ".env").read_text()
    match = re.search(r"@([^/]+)/", text)
    assert match
    return match[1]


def test_a_crashed_primary_is_replaced_nothing_is_lost_and_it_follows_again(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(200)
        cluster.crash("postgres")
        report = fail_over("unplanned")
        assert report.status is Status.WARN, report.sentence()
        writes.wait(50)
        assert not cluster.is_standby("standby")
        assert (cluster.node("postgres").data / "standby.signal").exists()
        again = rejoin()
        assert again.status is Status.OK, again.sentence()
        writes.wait(50)
    assert writes.lost(found(cluster, "standby")) == set()
    assert report.facts["acknowledged writes lost"].startswith("0")
    assert target(cluster) == f"127.0.0.1:{cluster.node('standby').port}"
    for phase in ("decision", "fencing", "promote", "first acknowledged write"):
        assert re.fullmatch(r"\d+\.\d{3} s", report.facts[phase]), phase
    assert cluster.is_standby("postgres")
    assert cluster.streaming("standby") == {"standby", "receiver"}
    until(lambda: len(found(cluster, "postgres")) == len(found(cluster, "standby")), what="equal rows", seconds=20)


def test_a_planned_switchover_loses_nothing_and_the_old_primary_follows(cluster: Cluster) -> None:
    with cluster.writing() as writes:
        writes.wait(200)
        report = fail_over()
        writes.wait(50)
    assert report.status is Status.WARN, report.sentence()
    assert writes.lost(found(cluster, "standby")) == set()
    assert report.facts["acknowledged writes lost"].startswith("0 (proven")
    assert cluster.is_standby("postgres")
    assert cluster.streaming("standby") == {"standby", "receiver"}
