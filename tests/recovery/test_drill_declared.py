"""A declared drill: PostgreSQL's port refuses the application's connections, the on-call person is paged and answers."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from blocks import toml
from blocks.environment import Environment
from flows.monitoring import incident
from flows.recovery.drill import run_drill
from flows.recovery.drills.declared import read_declaration
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.report import Status
from runbook.wait import until
from tasks.application import wait_healthy
from tasks.env_file import read_variable
from tasks.faults.relay import Relay
from tasks.services import start_services, stop_services
from tests import forked
from tests.recovery.conftest import System
from tests.recovery.drills import environment, steady
from tests.reports import rows as table
from tests.reports import text_of as finding
from tests.servers import free_port

DECLARATION = """
title = "データベースへの接続拒否"
situation = "アプリケーションからデータベースへの接続が拒否される"
goal = "検知と呼び出し、接続の回復 (RTO: 10分)"
detected_by = ["{sensor}"]
rto_seconds = 600
[fault]
kind = "{kind}"
control = "{control}"
"""
RUN = """
import sys
from flows.recovery.drill import run_drill
run_drill.fn(sys.argv[1], "declared", "refused", confirm=sys.argv[1])
"""


def test_the_examples_are_valid() -> None:
    env = Environment(name="trial", drills="deployments/environments/drills", rpo_seconds=1, rto_seconds=1)
    names = sorted(path.stem for path in (toml.DIRECTORY / "drills").glob("*.toml"))
    assert len(names) >= 4
    assert {read_declaration(env, name).fault.kind for name in names} == {
        "latency", "refused", "provider", "full_disk"
    }  # fmt: skip


def restart(system: System) -> None:
    env = environment(system)
    stop_services(env.services, ["backend"])
    start_services(env.services, ["backend"])
    wait_healthy(env.application, seconds=300)


@pytest.fixture
def relay(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """The application reaches PostgreSQL through it; three drills are declared."""
    steady(system)
    env = environment(system)
    listen, control = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    drills = tmp_path / "drills"
    drills.mkdir()
    for name, kind, sensor in (("refused", "refused", "application"), ("wrong", "refused", "somebody"),
                               ("clock", "clock", "application")):  # fmt: skip
        text = DECLARATION.format(kind=kind, sensor=sensor, control=f"http://127.0.0.1:{control[1]}")
        (drills / f"{name}.toml").write_text(text)
    file = toml.file_of(system.name)
    text = file.read_text().replace('"expectations/', f'"{file.parent}/expectations/')
    (tmp_path / "lab.toml").write_text(f'drills = "{drills}"\n{text}')
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "lab.toml"))
    env_file = Path(env.application.env_file)
    was, port = env_file.read_text(), urlsplit(read_variable(env.application, "DATABASE_URL", "")).port
    assert port
    assert was.count(f":{port}/") == 1
    with Relay(listen, ("127.0.0.1", port), control) as relay:
        env_file.write_text(was.replace(f":{port}/", f":{listen[1]}/"))
        try:
            restart(system)
            yield relay
        finally:
            relay.set_fault(None)
            env_file.write_text(was)
            restart(system)


def answer(system: System) -> None:
    """What the person who is paged does: a command line, as the message says."""
    kept = incident.incidents(environment(system))

    def paged() -> str:
        return next((one.id for one in kept.open() if one.told), "")

    try:
        found = until(paged, what="a page", seconds=300)
    except Unreachable:
        return
    argv = ["-m", "flows.monitoring.acknowledgement", "--environment", system.name, "--by", "山田"]
    forked.run([*argv, "--incident", found]).check_returncode()


def test_the_fault_is_detected_the_on_call_person_is_paged_and_nothing_is_lost(system: System, relay: Relay) -> None:
    env = environment(system)
    plan = run_drill.fn(system.name, "declared", "refused")
    assert plan.status is Status.PLANNED, plan.sentence()
    assert [step.detail for step in plan.plan_steps if step.step == "break"][0].startswith("relay http://127.0.0.1:")
    with pytest.raises(RunbookFailed, match="one wall clock"):
        run_drill.fn(system.name, "declared", "clock")
    with pytest.raises(OpsError, match=r"wrong.toml: detected_by.0 is wrong"):
        read_declaration(env, "wrong")
    with pytest.raises(OpsError, match="set declaration to one of clock, refused, wrong"):
        read_declaration(env, "other")

    person = threading.Thread(target=answer, args=(system,))
    person.start()
    report = run_drill.fn(system.name, "declared", "refused", page=True, confirm=system.name)
    person.join()
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert report.facts["detected by"].startswith("application after")
    assert "on-call by file" in report.facts["paged"]
    assert "acknowledged by 山田" in json.dumps(report.as_json(), ensure_ascii=False)
    assert incident.incidents(env).open() == []
    controls = {row[0]: row[2] for row in table(report, "Negative controls")}
    assert set(controls) == {"the fault has ended", "a fault without an effect"}
    assert all(told.startswith("no alarm of application") for told in controls.values())
    assert relay.fault is None


@pytest.mark.soak
def test_killed_while_the_fault_lasts_it_is_healed_by_the_next_launch(system: System, relay: Relay) -> None:
    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OPS_FAILPOINT": "drill: struck"}
    done = forked.run(["-c", RUN, system.name], variables)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert relay.fault == "refused"
    healed = run_drill.fn(system.name, confirm=system.name)
    assert healed.status is Status.WARN, healed.sentence()
    assert "declared:refused" in finding(healed, "a drill that had not ended")
    assert relay.fault is None
    assert system.healthy()
