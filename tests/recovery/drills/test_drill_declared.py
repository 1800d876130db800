"""Declared drills: each kind of fault is made in the lab, detected, ended; the on-call person is paged and answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from blocks.config import toml
from blocks.environment import Environment
from flows.monitoring import incident
from flows.recovery.drills.drill import run_drill
from flows.recovery.drills.scenario import AGAIN
from flows.recovery.drills.scenarios import declared
from flows.recovery.drills.scenarios.declared import read_declaration
from lab import lifecycle
from runbook.errors import OpsError, RunbookFailed, Unreachable
from runbook.files.chain import reports_in
from runbook.report import Status
from runbook.wait import until
from tasks.application.env_file import read_variable
from tasks.application.health import wait_healthy
from tasks.faults.relay import Relay
from tasks.host.services import start_services, stop_services
from tests.fixtures import forked
from tests.fixtures.reports import rows as table
from tests.fixtures.reports import text_of as finding
from tests.fixtures.servers import free_port
from tests.recovery.conftest import System
from tests.recovery.drills.running import environment, steady

DECLARATION = """
title = "データベースへの接続拒否"
situation = "アプリケーションからデータベースへの接続が拒否される"
goal = "検知と呼び出し、接続の回復 (RTO: 10分)"
detected_by = {sensors}
rto_seconds = 600
[fault]
kind = "{kind}"
{keys}
"""
RUN = """
import signal, sys
from prefect.exceptions import TerminationSignal

def end(number, frame):
    raise TerminationSignal(number)

signal.signal(signal.SIGTERM, end)
from flows.recovery.drills.drill import run_drill
run_drill.fn(sys.argv[1], "declared", sys.argv[2], confirm=sys.argv[1])
"""
CLOCK = 'service = "backend"\nahead_seconds = 7200\ndirectory = "{directory}"'
ENDED, EFFECT = "the fault has ended", "a fault without an effect"


def test_the_examples_are_valid() -> None:
    env = Environment(name="trial", drills="deployments/environments/drills", rpo_seconds=1, rto_seconds=1)
    names = sorted(path.stem for path in (toml.DIRECTORY / "drills").glob("*.toml"))
    assert len(names) >= 5
    assert {read_declaration(env, name).fault.kind for name in names} == {
        "latency",
        "refused",
        "provider",
        "full_disk",
        "clock",
    }


def restart(system: System) -> None:
    env = environment(system)
    stop_services(env.services, ["backend"])
    start_services(env.services, ["backend"])
    wait_healthy(env.application, seconds=300)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test mounts a small file system: of the environment's disks, by its TOML."""
    return tmp_path_factory.mktemp("disk")


def drop_ins(system: System) -> Path:
    return lifecycle.existing(system.name)[0].layout.drop_ins


def declarations(system: System, control: str, disk: Path) -> dict[str, str]:
    """Drills by name: one of each kind, and two that cannot be held."""
    through, clock = f'control = "{control}"', CLOCK.format(directory=drop_ins(system))
    known = {
        "refused": ("refused", "application", through),
        "latency": ("latency", "response", f"{through}\ndelay_seconds = 1"),
        "timeout": ("timeout", "application", through),
        "provider": ("provider", "providers", 'provider = "azure"'),
        "full_disk": ("full_disk", "disk", f'directory = "{disk}"'),
        "clock": ("clock", "clock", clock),
        "wrong": ("refused", "somebody", through),
        "elsewhere": ("clock", "clock", CLOCK.format(directory="/nowhere")),
    }
    return {
        name: DECLARATION.format(kind=kind, sensors=json.dumps([sensor]), keys=keys)
        for name, (kind, sensor, keys) in known.items()
    }


@pytest.fixture(scope="module")
def relay(system: System, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """The application reaches PostgreSQL through it; the drills are declared."""
    steady(system)
    env, place = environment(system), tmp_path_factory.mktemp("declared")
    listen, control = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    (place / "drills").mkdir()
    for name, text in declarations(system, f"http://127.0.0.1:{control[1]}", disk).items():
        (place / "drills" / f"{name}.toml").write_text(text)
    file = toml.file_of(system.name)
    text = file.read_text().replace('"expectations/', f'"{file.parent}/expectations/')
    text = re.sub(r'(?m)^backup = ".*/db_backup.log"$', f'backup = "{disk}/db_backup.log"', text)
    (place / "lab.toml").write_text(f'drills = "{place}/drills"\n{text}')
    env_file = Path(env.application.env_file)
    was, port = env_file.read_text(), urlsplit(read_variable(env.application, "DATABASE_URL", "")).port
    assert port
    assert was.count(f":{port}/") == 1
    with pytest.MonkeyPatch.context() as patch, Relay(listen, ("127.0.0.1", port), control) as relay:
        patch.setenv("OPS_ENVIRONMENT_FILE", str(place / "lab.toml"))
        env_file.write_text(was.replace(f":{port}/", f":{listen[1]}/"))
        try:
            restart(system)
            yield relay
        finally:
            relay.set_fault(None)
            env_file.write_text(was)
            restart(system)


def test_a_lab_that_comes_up_removes_what_a_killed_drill_left(system: System) -> None:
    services, left = lifecycle.existing(system.name)[0], drop_ins(system) / "zz-drill-grc-backend.conf"
    left.write_text("[program:grc-backend]\ncommand = false\n")
    assert services.configure(), "its services restart"
    assert not left.exists()
    assert not services.configure()


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
    steps = ["break", "recover", "end the fault", "check for false alarms", "clean up"]
    assert [step.step for step in plan.plan_steps] == steps
    with pytest.raises(RunbookFailed, match=r"/nowhere is no directory that this worker can write"):
        run_drill.fn(system.name, "declared", "elsewhere")
    with pytest.raises(OpsError, match=r"wrong.toml: detected_by.0 is wrong"):
        read_declaration(env, "wrong")
    with pytest.raises(OpsError, match="set declaration to one of clock, elsewhere, full_disk, latency"):
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
    assert set(controls) == {ENDED, EFFECT}
    assert all(told.startswith("no alarm of application") for told in controls.values())
    assert relay.fault is None


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("kind", "sensor", "controls"),
    [
        ("latency", "response", {ENDED, EFFECT}),
        ("timeout", "application", {ENDED, EFFECT}),
        ("provider", "providers", {ENDED}),
        pytest.param("full_disk", "disk", {ENDED, EFFECT}, marks=pytest.mark.system),
        ("clock", "clock", {ENDED, EFFECT}),
    ],
    ids=["latency", "timeout", "provider", "full_disk", "clock"],
)
def test_every_other_kind_of_fault_is_made_detected_and_ended(
    system: System,
    relay: Relay,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sensor: str,
    controls: set[str],
) -> None:
    monkeypatch.setattr(declared, "QUIET_SECONDS", 1.0)
    with mounted(disk) if kind == "full_disk" else contextlib.nullcontext():
        report = run_drill.fn(system.name, "declared", kind, confirm=system.name)
        left = list(disk.iterdir())
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert sensor in finding(report, "noticed by")
    rows = {row[0]: row[2] for row in table(report, "Negative controls")}
    assert set(rows) == controls
    assert all(told.startswith(f"no alarm of {sensor}") for told in rows.values())
    assert (relay.fault, left) == (None, [])
    assert not any(drop_ins(system).iterdir())
    assert system.healthy()


def test_cancelled_while_the_fault_lasts_it_is_healed_at_once_and_the_report_says_what_is_left(
    system: System, relay: Relay
) -> None:
    env = environment(system)
    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OPS_FAILPOINT": "drill: struck:cancel"}
    done = forked.run(["-c", RUN, system.name, "refused"], variables)
    assert done.returncode, done.stdout
    assert relay.fault is None
    newest = json.loads(reports_in(env.reports_directory)[-1].read_text())
    told = {one["name"]: (one["value"], one["hint"]) for one in newest["findings"]}
    healed = "the system is healed, and the drill has not ended"
    assert told["state of the system"] == (healed, AGAIN)
    plan = run_drill.fn(system.name)
    assert [step.step for step in plan.plan_steps] == ["heal", "clean up"]
    assert "half-done drill was ended" in run_drill.fn(system.name, confirm=system.name).outcome


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["refused", "clock"])
def test_killed_while_the_fault_lasts_it_is_healed_by_the_next_launch(system: System, relay: Relay, kind: str) -> None:
    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OPS_FAILPOINT": "drill: struck"}
    done = forked.run(["-c", RUN, system.name, kind], variables)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if kind == "clock":
        assert "the clock of backend is +7" in declared.clock(environment(system), Path())
    else:
        assert relay.fault == kind
    healed = run_drill.fn(system.name, confirm=system.name)
    assert healed.status is Status.WARN, healed.sentence()
    assert f"declared:{kind}" in finding(healed, "an earlier drill did not end")
    assert relay.fault is None
    assert system.healthy()
    assert declared.clock(environment(system), Path()) == ""
