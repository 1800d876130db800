"""The options that are shown in an incident: with everything up, with the primary dead, with nothing left."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.restore import restore_database
from flows.recovery.objectives.options import FORMS, OPTIONS, Option, find_options, show_recovery_options
from flows.recovery.objectives.points import read_recovery_points
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


def options(report: Report) -> list[dict[str, str]]:
    (table,) = [evidence for evidence in report.evidence if evidence.name == OPTIONS]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def forms(report: Report) -> str:
    (evidence,) = [evidence for evidence in report.evidence if evidence.name == FORMS]
    return evidence.text


def found(name: str) -> list[Option]:
    env = Environment.find(name)
    return find_options(env, read_recovery_points(env))


def test_the_least_loss_comes_first_and_a_dead_primary_changes_the_form(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE accounts (id int PRIMARY KEY)")
    base = backup_cluster.fn(NAME).facts["backup"]
    dump = backup_database.fn(NAME).facts["backup"]
    cluster.sql("postgres", "INSERT INTO accounts VALUES (1)")
    cluster.settle()
    shown = options(show())
    assert [option["lost"] for option in shown][:3] == ["nothing of grc_db is lost"] * 3
    assert {option["option"] for option in shown[:3]} >= {
        "failover to the standby",
        "the whole cluster at a point in time",
    }
    assert all(option["takes"] == "never measured" for option in shown)
    full = [option for option in found(NAME) if option.flow == "full-restore"]
    assert [option.parameters["method"] for option in full] == ["cluster", "dump"], "as full-restore ranks them"
    cluster_at, dump_at = (option.at for option in full)
    assert cluster_at
    assert dump_at
    assert cluster_at > dump_at
    failover = next(option for option in found(NAME) if option.flow == "postgres-failover")
    assert failover.parameters["mode"] == "planned"
    assert {option.parameters["backup"] for option in found(NAME) if option.flow == "restore-tables"} == {dump}
    reach = read_recovery_points(cluster.environment)
    assert base in {point.name for point in reach.points}
    sorted_ = [option.rank(reach.now) for option in find_options(cluster.environment, reach)]
    assert sorted_ == sorted(sorted_)
    restore_database.fn(NAME, confirm=NAME)
    assert re.search("Restore database (OK|WARN); every write of grc_db after", show().facts["last recovery"])
    assert any(option.flow == "undo-restore" and option.at for option in found(NAME))

    cluster.crash("postgres")
    failover = next(option for option in found(NAME) if option.flow == "postgres-failover")
    assert failover.parameters == {
        "environment": NAME,
        "mode": "unplanned",
        "new_primary": f"127.0.0.1:{cluster.node('standby').port}",
    }
    needing = {option.flow for option in found(NAME) if "a server that accepts writes" in str(option.problems)}
    assert needing == {"restore-database", "restore-tables", "restore-to-point"}, "the last one for single tables"
    cluster.crash("standby")
    report = show()
    assert report.status is Status.CRITICAL, "of the files there is nothing"
    first, last = (
        options(report)[0],
        [option for option in options(report) if option["option"] == "failover to the standby"][0],
    )
    assert first["option"] == "the whole cluster at a point in time"
    assert "rejoin-standby" in last["fix before"]
    assert last["restored up to"] == "none"

    command = ["-m", "flows.recovery.objectives.options", "--environment", NAME]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = forked.run(command, environment)
    assert "python -m flows.recovery.point.restore --environment pair --by latest --source backups" in done.stdout
    assert done.stderr.startswith("Show recovery options on pair: CRITICAL: ")


def test_missing_disk_space_is_reported(cluster: Cluster) -> None:
    """A backup whose manifest says that it takes more than any disk has."""
    name = backup_database.fn(NAME).facts["backup"]
    path = cluster.root / "backups" / "postgresql" / name
    old = manifest.read(path)
    manifest.write(path, old.model_copy(update={"content": {**old.content, "bytes": 10**18}}))
    option = next(option for option in found(NAME) if option.flow == "restore-database")
    assert "of disk space are missing" in option.problems[0]
    assert option.needs > option.free > 0
