"""The ways that are shown in an incident: with everything up, with the primary dead, with nothing left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from blocks.environment import Environment
from flows.database.backup import backup_database
from flows.database.base_backup import backup_cluster
from flows.database.copies import replicate_backups
from flows.database.restore import restore_database
from flows.recovery.options import FORMS, WAYS, show_recovery_options
from flows.recovery.points import read_reach
from flows.recovery.ways import Way, find_ways
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tasks import manifest
from tasks.services import start_services, stop_services
from tests.clusters import NAME, Cluster
from tests.recovery.conftest import System

ROOT = Path(__file__).resolve().parents[2]


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


def flow_of(name: str) -> Flow[..., object] | None:
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    wanted = [entry["entrypoint"] for entry in entries if entry["entrypoint"].endswith(f".{name.replace('-', '_')}")]
    return load_flow_from_entrypoint(wanted[0]) if wanted else None


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
        "environment": NAME, "mode": "unplanned", "new_primary": f"127.0.0.1:{cluster.node('standby').port}",
    }  # fmt: skip
    needing = {way.flow for way in found(NAME) if "a server that takes writes" in str(way.problems)}
    assert needing == {"restore-database", "restore-tables", "restore-to-point"}, "the last one for single tables"
    cluster.crash("standby")
    report = show()
    assert report.status is Status.CRITICAL, "of the files there is nothing"
    first, last = ways(report)[0], [way for way in ways(report) if way["way"] == "failover to the standby"][0]
    assert first["way"] == "the whole cluster at a point in time"
    assert "rejoin-standby" in last["before that"]
    assert last["newest moment"] == "none"

    command = [sys.executable, "-m", "flows.recovery.options", "--environment", NAME]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert "python -m flows.recovery.point_in_time --environment pair --by latest --source backups" in done.stdout
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


@pytest.mark.usefixtures("deployed")
def test_every_form_is_filled_in_with_what_its_flow_takes(system: System) -> None:
    """Through Prefect, as the UI launches it; and again without the database, Redis, and Prefect."""
    replicate_backups.fn(system.name)
    report = show_recovery_options(system.name)
    links = re.findall(r"\[([a-z-]+)/([a-z0-9-]+)\]\((\S+)\)", forms(report))
    flows = {flow for flow, _, _ in links}
    assert flows >= {
        "postgres-failover",
        "restore-database",
        "restore-tables",
        "full-restore",
        "redis-failover",
        "restore-redis",
    }
    for flow, environment, address in links:
        url = urllib.parse.urlparse(address)
        assert re.fullmatch(r".*/deployments/deployment/[0-9a-f-]{36}/run", url.path)
        parameters = json.loads(urllib.parse.parse_qs(url.query)["parameters"][0])
        deployed = flow_of(flow)
        assert deployed
        assert "confirm" not in parameters, "a link confirms nothing"
        assert deployed.validate_parameters(parameters)["environment"] == environment
    region = [way for way in ways(report) if way["way"] == f"failover of the region to {system.lab.region().name}"]
    assert [way["helps when"] for way in region] == ["region lost"]
    assert "region-failover" in forms(report)

    services = Environment.find(system.name).services
    stop_services.work(services, ["backend", "standby", "postgres"])
    try:
        report = show(system.name)
        assert {way["way"] for way in ways(report) if way["newest moment"] != "none"} >= {
            "everything: database, Redis and files from backups", "the database from a backup", "Redis from a backup",
        }  # fmt: skip
        assert "does not answer" in report.facts["primary of the database"]
        assert f"python -m flows.recovery.full_restore --environment {system.name} --source copies" in forms(report)
    finally:
        start_services.work(services, ["postgres", "standby", "backend"])
