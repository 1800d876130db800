"""A lab with its runbooks in Prefect: what is deployed, the forms that reports link to, and the demonstration, which
takes everything down and brings it back; what must keep that from calling a restore proven."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psycopg
import pytest
import yaml  # type: ignore[import-untyped]
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint

from blocks.environment import Environment
from flows.application.files import backup_files
from flows.database.backup import backup_database
from flows.database.copies import replicate_backups
from flows.recovery.objectives.options import show_recovery_options
from flows.redis.persistence import backup_redis
from lab import demo as story
from lab.client import Lab
from lab.demo import Demo
from lab.progress import silent
from lab.proof import Proof
from tasks.host.services import start_services, stop_services
from tests.fixtures.prefect_client import login
from tests.lab.test_lab import command, pids
from tests.recovery.objectives.test_options import forms, options, show

ROOT = Path(__file__).resolve().parents[2]


def flow_of(name: str) -> Flow[..., object] | None:
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    wanted = [entry["entrypoint"] for entry in entries if entry["entrypoint"].endswith(f".{name.replace('-', '_')}")]
    return load_flow_from_entrypoint(wanted[0]) if wanted else None


def help_of(lab: Lab, flow: str, parameter: str) -> str:
    """What a deployed form says beside a field."""
    address = f"{lab.status()['prefect_api']}/deployments/name/{flow}/{lab.name}"
    found = httpx.get(address, auth=login(), timeout=120).json()
    return str(found["parameter_openapi_schema"]["properties"][parameter]["description"])


def test_up_again_changes_nothing(deployed: Lab) -> None:
    before = pids(deployed)
    done = command("up", "--name", deployed.name)
    assert done.returncode == 0, done.stderr
    assert pids(deployed) == before
    assert deployed.environ().items() <= os.environ.items()


def test_no_schedule_runs_that_nobody_turned_on(deployed: Lab) -> None:
    status = deployed.status()
    body = {"work_pools": {"name": {"any_": [deployed.name]}}}
    rows = httpx.post(f"{status['prefect_api']}/deployments/filter", json=body, auth=login(), timeout=120).json()
    scheduled = {found["entrypoint"].split(".")[-1]: found["paused"] for found in rows if found["schedules"]}
    assert scheduled["check_recovery_objectives"]
    assert all(scheduled.values()), "in a lab nothing runs that nobody turned on"


def test_every_form_is_filled_in_with_what_its_flow_takes(deployed: Lab) -> None:
    """Through Prefect, as the UI launches it; and again without the database, Redis, and Prefect."""
    for back_up in (backup_database, backup_redis, backup_files, replicate_backups):
        back_up.fn(deployed.name)
    report = show_recovery_options(deployed.name)
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
        runbook = flow_of(flow)
        assert runbook
        assert "confirm" not in parameters, "a link confirms nothing"
        assert runbook.validate_parameters(parameters)["environment"] == environment
    backups = Environment.find(deployed.name).backups
    stores = {"restore-database": backups.postgres, "restore-redis": backups.redis, "restore-files": backups.files}
    for flow, store in stores.items():
        (help_text,) = re.findall(r" ｜ (?:newest first|新しい順): (.*)", help_of(deployed, flow, "backup"))
        listed = re.findall(
            r"(\w+) \(20\d\d-\S+ \S+ [+-]\d\d:\d\d, [\d.]+ [kMG]?B, (?:(?:not )?verified|検証済み|未検証)\)", help_text
        )
        assert listed
        assert all((Path(store) / name).is_dir() for name in listed)
        assert len(listed) <= 5
    region = [
        option
        for option in options(report)
        if option["option"] == f"failover of the region to {deployed.region().name}"
    ]
    assert [option["helps when"] for option in region] == ["region lost"]
    assert "region-failover" in forms(report)

    services = Environment.find(deployed.name).services
    stop_services.work(services, ["backend", "standby", "postgres"])
    try:
        report = show(deployed.name)
        assert {option["option"] for option in options(report) if option["restored up to"] != "none"} >= {
            "everything, the database from a dump",
            "the database from a backup",
            "Redis from a backup",
        }
        assert "does not answer" in report.facts["primary of the database"]
        assert report.facts["redis source"], "as full-restore chooses it"
        assert "Redis: sources of its data" in {evidence.name for evidence in report.evidence}
        assert f"python -m flows.recovery.full_restore --environment {deployed.name} --source copies" in forms(report)
    finally:
        start_services.work(services, ["postgres", "standby", "backend"])


@pytest.fixture(scope="module")
def played(deployed: Lab) -> Iterator[tuple[Demo, Proof]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "BEFORE_SECONDS", 1.0)
        patch.setattr(story, "AFTER_SECONDS", 2.0)
        demo = Demo.on(deployed.name, silent)
        try:
            yield demo, demo.play()
        finally:
            for base in Path(demo.status["stores"]["cluster"]).glob("base_*"):
                shutil.rmtree(base)
            deployed.renew_standby()


def test_the_restore_is_proven(played: tuple[Demo, Proof]) -> None:
    demo, proof = played
    assert proof.problems() == []
    assert proof.lost
    assert proof.lost.lost == (), "no acknowledged write of the database is lost"
    assert proof.lost.acknowledged > 10
    assert proof.report["facts"]["writes lost"].startswith("0 ")
    assert int(proof.dump_alone().split()[0]) > 0
    assert proof.ledger.acknowledged(before=proof.backups_began)
    text = proof.text(demo.links(proof.run))
    shown = ("Full restore on", "swap cluster", "RTO:", "DROP DATABASE", "/artifacts/artifact/", "the dump alone would")
    for one in (*shown, "they agree, write by write: 0 of 0"):
        assert one in text


def test_what_keeps_it_from_being_proven(played: tuple[Demo, Proof]) -> None:
    _, proof = played
    findings = [item for item in proof.report["findings"] if item["name"] != "the copy is at the target"]
    assert proof.lost
    missing = replace(proof.lost, lost=tuple(proof.ledger.acknowledged()[-1:]))
    for broken, expected in (
        (replace(proof, run=replace(proof.run, state="FAILED", message="why")), "the flow run ended FAILED: why"),
        (replace(proof, report={**proof.report, "status": "CRITICAL"}), "the report says CRITICAL"),
        (replace(proof, report={**proof.report, "findings": findings}), "does not say “the copy is at the target”"),
        (replace(proof, lost=missing), "writes are lost that the report does not name"),
        (replace(proof, lost=missing), "1 acknowledged writes are lost, although the WAL had them"),
        (replace(proof, health='503 {"database": "unreachable"}'), "not healthy: 503"),
        (replace(proof, lost=None), "cannot be asked"),
    ):
        assert any(expected in problem for problem in broken.problems()), expected


def test_a_write_from_before_the_backup_that_is_gone_is_noticed(played: tuple[Demo, Proof]) -> None:
    demo, proof = played
    victim = next(a for a in proof.ledger.acknowledged(before=proof.backups_began) if a.kind == "session")
    with psycopg.connect(demo.status["postgres"]["dsn"]) as connection:
        connection.execute("DELETE FROM interview_sessions WHERE id = %s", [victim.key])
    problems = replace(proof, lost=demo.count_lost()).problems()
    assert any(problem.startswith("1 of ") and "before the backup are not there" in problem for problem in problems)
