"""Services under a real supervisord: stopped and started in order, each proven, failures explained."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prefect.exceptions import TerminationSignal
from pydantic import SecretStr

from blocks.places import Application
from blocks.services.supervisor import SupervisorServices
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.application.health import wait_healthy
from tasks.host.services import read_services, start_again, start_services, started_if_cancelled, stop_services
from tests.fixtures.servers import free_port

PASSWORD = "super-4713"
# Each program writes when it begins and when it is told to end; it takes its time for that.
PROGRAM = """
import os, pathlib, signal, sys, time
name, journal = sys.argv[1], pathlib.Path(sys.argv[2])
def note(what):
    with journal.open("a") as file: file.write(f"{what} {name} {os.getpid()}\\n")
def end(*_):
    time.sleep(0.3); note("end"); sys.exit(0)
signal.signal(signal.SIGTERM, end)
note("begin")
while True: time.sleep(60)
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[SupervisorServices]:
    port = free_port()
    (tmp_path / "program.py").write_text(PROGRAM)
    sections = [f"[inet_http_server]\nport=127.0.0.1:{port}\nusername=ops\npassword={PASSWORD}\n"]
    sections.append(f"[supervisord]\nnodaemon=true\nlogfile={tmp_path}/s.log\npidfile={tmp_path}/s.pid\nuser=root\n")
    # Where all of a machine's supervisords have it, each removes the others' logs when it starts.
    sections.append(f"childlogdir={tmp_path}\n")
    sections.append(
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
    )
    for name in ("backend", "frontend", "redis"):
        command = f"{sys.executable} {tmp_path}/program.py {name} {tmp_path}/journal"
        sections.append(f"[program:grc-{name}]\ncommand={command}\nautostart=true\nstartsecs=0\nstopwaitsecs=120\n")
    broken = f"{sys.executable} -c \"print('no such database: grc_db', flush=True); raise SystemExit(3)\""
    sections.append(f"[program:broken]\ncommand={broken}\nautostart=false\nstartsecs=120\nstartretries=0\n")
    slow = f"{sys.executable} {tmp_path}/program.py slow {tmp_path}/journal"
    sections.append(f"[program:slow]\ncommand={slow}\nautostart=false\nstartsecs=600\nstopwaitsecs=120\n")
    text = "\n".join(sections)
    if psutil.Process().uids().real != 0:
        text = text.replace("user=root\n", "")
    (tmp_path / "supervisord.conf").write_text(text)
    argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(tmp_path / "supervisord.conf")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    names = {"backend": "grc-backend", "frontend": "grc-frontend", "redis": "grc-redis", "postgres": "broken"}
    names["archiver"] = "slow"
    block = SupervisorServices(
        url=f"http://127.0.0.1:{port}", username="ops", password=SecretStr(PASSWORD), names=names
    )
    try:
        until(lambda: len(journal(tmp_path)) == 3, what="the programs' start", seconds=120)
        yield block
    finally:
        process.terminate()
        process.wait(180)


def journal(directory: Path) -> list[list[str]]:
    path = directory / "journal"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_stopping_keeps_the_order_and_ends_the_processes(services: SupervisorServices, tmp_path: Path) -> None:
    pids = [int(line[2]) for line in journal(tmp_path)]

    stopped = stop_services(services, ["backend", "frontend", "redis"])

    assert stopped.roles == stopped.were_running == ("backend", "frontend", "redis")
    assert [line[1] for line in journal(tmp_path)[3:]] == ["backend", "frontend", "redis"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    states = read_services(services, ["backend", "redis"])
    assert states.running == {"backend": False, "redis": False}
    assert states.stopped == ("backend", "redis")


def test_stopping_and_starting_twice_is_harmless(services: SupervisorServices, tmp_path: Path) -> None:
    stop_services(services, ["backend"])
    assert stop_services(services, ["backend"]).were_running == ()
    assert start_services(services, ["redis", "backend"]).roles == ("redis", "backend")
    start_services(services, ["backend"])
    assert read_services(services, ["backend", "redis"]).stopped == ()
    until(lambda: len(journal(tmp_path)) > 4, what="the backend's second start", seconds=120)
    assert [line[:2] for line in journal(tmp_path)[3:]] == [["end", "backend"], ["begin", "backend"]]


def test_a_service_that_is_being_started_counts_as_one_that_ran(services: SupervisorServices) -> None:
    """A run that ends before its change starts it again."""
    services.start("archiver")
    states = read_services(services, ["archiver", "postgres"])
    assert states.running == {"archiver": False, "postgres": False}
    assert states.wanted == ("archiver",)
    assert stop_services(services, ["archiver", "postgres"]).were_running == ("archiver",)
    assert read_services(services, ["archiver"]).wanted == ()


@contextlib.contextmanager
def cancelled_while(ready: Callable[[], bool]) -> Iterator[None]:
    """The block is cancelled, as Prefect does it, when `ready`."""

    def end(*_: object) -> None:
        raise TerminationSignal(signal.SIGUSR1)

    def send() -> None:
        until(ready, what="the moment of the cancel", seconds=120, every_seconds=0.005)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, end)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(TerminationSignal):
            yield
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)


def is_stopping(services: SupervisorServices, role: str) -> bool:
    return services.state(role).told == "STOPPING"


def test_a_stop_that_is_cancelled_comes_to_its_end(services: SupervisorServices, tmp_path: Path) -> None:
    """Its manager goes on with it: what is started again before is not started at all."""
    with cancelled_while(lambda: is_stopping(services, "backend")):
        stop_services(services, ["frontend", "backend", "redis"])
    assert read_services(services, ["frontend", "backend", "redis"]).stopped == ("frontend", "backend")
    found = start_again(services, ["frontend", "backend", "redis", "postgres"])
    assert found.running == ("frontend", "backend", "redis"), "one that does not start keeps no other one stopped"
    assert "no such database: grc_db" in found.problems["postgres"]


def test_a_service_that_somebody_stops_is_started_when_it_has_ended(
    services: SupervisorServices, tmp_path: Path
) -> None:
    services._call("backend", "stopProcess", "grc-backend", False)
    assert is_stopping(services, "backend")
    start_services(services, ["backend"])
    until(lambda: len(journal(tmp_path)) > 4, what="its second start", seconds=120)
    assert [line[:2] for line in journal(tmp_path)[3:]] == [["end", "backend"], ["begin", "backend"]]


def test_a_restart_that_is_cancelled_leaves_nothing_stopped(services: SupervisorServices) -> None:
    with cancelled_while(lambda: is_stopping(services, "backend")), started_if_cancelled(services, ["backend"]):
        stop_services(services, ["backend"])
        start_services(services, ["backend"])
    assert services.is_running("backend")


def test_a_service_that_does_not_start_is_named_with_the_end_of_its_log(services: SupervisorServices) -> None:
    with pytest.raises(OpsError, match="postgres does not start: postgres is stopped: FATAL") as raised:
        start_services(services, ["postgres"])
    assert "no such database: grc_db" in raised.value.hint


def test_an_answer_proves_a_start_before_its_manager_does(services: SupervisorServices, tmp_path: Path) -> None:
    """supervisor waits for startsecs, here ten minutes. A service that has ended is still named."""

    def answers(role: str) -> bool:
        if role != "archiver":
            raise Unreachable("nothing answers", "wait")
        return any(line[1] == "slow" for line in journal(tmp_path))

    started = time.monotonic()
    assert start_services(services, ["archiver"], seconds=300, answers=answers).roles == ("archiver",)
    assert time.monotonic() - started < 300
    assert not services.is_running("archiver"), "by its manager's word"
    with pytest.raises(OpsError, match="postgres does not start: postgres is stopped: FATAL"):
        start_services(services, ["postgres"], answers=answers)


def test_nobody_waits_for_the_health_of_what_has_ended(services: SupervisorServices) -> None:
    """A start is believed at once; it may have ended since."""
    address = f"http://127.0.0.1:{free_port()}"
    application = Application(url=address, health_path="/ready")
    stop_services(services, ["backend"])
    with pytest.raises(OpsError, match="^backend has ended again: STOPPED"):
        wait_healthy(application, seconds=120, services=services)
    start_services(services, ["backend"])
    with pytest.raises(OpsError, match="not healthy after 1 s: backend at .* does not answer"):
        wait_healthy(application, seconds=1, services=services)
    stop_services(services, ["frontend"])  # nobody asks for it
    silent = services.model_copy(update={"url": f"http://127.0.0.1:{free_port()}"})  # no word of the service
    for manager in (services, silent):
        with pytest.raises(OpsError, match="not healthy after 1 s: backend at .* does not answer"):
            wait_healthy(application, seconds=1, services=manager)


def test_a_role_without_a_service_and_a_dead_supervisor(services: SupervisorServices) -> None:
    with pytest.raises(OpsError, match="names no service for standby"):
        stop_services(services, ["standby"])
    dead = services.model_copy(update={"url": f"http://127.0.0.1:{free_port()}"})
    started = time.monotonic()
    with pytest.raises(Unreachable, match="does not answer"):
        read_services.work(dead, ["backend"])
    assert time.monotonic() - started < 120
    wrong = services.model_copy(update={"password": SecretStr("wrong")})
    with pytest.raises(OpsError, match="401") as raised:
        read_services.work(wrong, ["backend"])
    assert "wrong" not in str(raised.value)
