"""The ways that are shown in an incident: with everything up, with the primary dead, with nothing left."""

from __future__ import annotations

import os
from pathlib import Path

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.restore import restore_database
from flows.recovery.objectives.options import FORMS, WAYS, Way, find_ways, show_recovery_options
from flows.recovery.objectives.points import read_reach
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks.backups import manifest
from tests.fixtures import forked
from tests.fixtures.postgres.clusters import NAME, Cluster

ROOT = Path(__file__).resolve().parents[3]


def show(name: str = NAME) -> Report:
    try:
        return show_recovery_options.fn(name)
    except RunbookFailed as error:
        return error.report


def ways(report: Report) -> list[dict[str, str]]:
    (table,) = [evidence for evidence in report.evidence if evidence.name == WAYS]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def forms(report: Report) -> str:
    (evidence,) = [evidence for evidence in report.evidence if evidence.name == FORMS]
    return evidence.text


def found(name: str) -> list[Way]:
    env = Environment.find(name)
    return find_ways(env, read_reach(env))


def test_the_least_loss_comes_first_and_a_dead_primary_changes_the_form(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY)")
    base = backup_cluster.fn(NAME).facts["backup"]
    dump = backup_database.fn(NAME).facts["backup"]
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    cluster.settle()
    shown = ways(show())
    assert [way["lost"] for way in shown][:3] == ["nothing"] * 3
    assert {way["way"] for way in shown[:3]} >= {"failover to the standby", "the whole cluster at a point in time"}
    assert all(way["takes"] == "never measured" for way in shown)
    failover = next(way for way in found(NAME) if way.flow == "postgres-failover")
    assert failover.parameters["mode"] == "planned"
    assert {way.parameters["backup"] for way in found(NAME) if way.flow == "restore-tables"} == {dump}
    reach = read_reach(cluster.environment)
    assert base in {point.name for point in reach.points}
    sorted_ = [way.rank(reach.now) for way in find_ways(cluster.environment, reach)]
    assert sorted_ == sorted(sorted_)
    restore_database.fn(NAME, confirm=NAME)
    assert any(way.flow == "undo-restore" and way.at for way in found(NAME))

    cluster.crash("postgres")
    failover = next(way for way in found(NAME) if way.flow == "postgres-failover")
    assert failover.parameters == {
        "environment": NAME,
        "mode": "unplanned",
        "new_primary": f"127.0.0.1:{cluster.node('standby').port}",
    }
    needing = {way.flow for way in found(NAME) if "a server that takes writes" in str(way.problems)}
    assert needing == {"restore-database", "restore-tables", "restore-to-point"}, "the last one for single tables"
    cluster.crash("standby")
    report = show()
    assert report.status is Status.CRITICAL, "of the files there is nothing"
    first, last = ways(report)[0], [way for way in ways(report) if way["way"] == "failover to the standby"][0]
    assert first["way"] == "the whole cluster at a point in time"
    assert "rejoin-standby" in last["before that"]
    assert last["newest moment"] == "none"

    command = ["-m", "flows.recovery.objectives.options", "--environment", NAME]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = forked.run(command, environment)
    assert "python -m flows.recovery.point.restore --environment pair --by latest --source backups" in done.stdout
    assert done.stderr.startswith("Show recovery options on pair: CRITICAL")


def test_too_little_room_is_told(cluster: Cluster) -> None:
    """A backup whose manifest says that it takes more than any disk has."""
    name = backup_database.fn(NAME).facts["backup"]
    path = cluster.root / "backups" / "postgresql" / name
    old = manifest.read(path)
    manifest.write(path, old.model_copy(update={"content": {**old.content, "bytes": 10**18}}))
    way = next(way for way in found(NAME) if way.flow == "restore-database")
    assert "too little room" in way.problems[0]
    assert way.needs > way.free > 0
