"""Service managers: a real supervisord. systemd, which does not run here, and Docker: tests/system."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from blocks.services.supervisor import SupervisorServices, _Transport, end_in
from blocks.services.systemd import SystemdServices
from runbook import shell
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.host.services import start_services
from tests.fixtures.servers import free_port

PASSWORD = "s3cret/p@ss:ward 候"
SUPERVISORD = """\
[supervisord]
nodaemon = true
pidfile = {root}/supervisord.pid
logfile = {root}/supervisord.log
{user}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[inet_http_server]
port = 127.0.0.1:{port}
username = ops
password = {password}
[program:grc-backend]
command = {python} -u -c "import time; [print('候補者の行', n) for n in range(500)]; time.sleep(300)"
autostart = false
startsecs = 0
stdout_logfile = {root}/backend.log
[program:crashing]
command = {python} -c "import time; time.sleep(2); raise SystemExit(1)"
autostart = false
startsecs = 0
stdout_logfile = {root}/crashing.log
[program:broken]
command = {python} -c "raise SystemExit(1)"
autostart = false
startsecs = 120
startretries = 0
stdout_logfile = {root}/broken.log
"""


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SupervisorServices]:
    root, port = tmp_path_factory.mktemp("supervisor"), free_port()
    user = "user = root" if os.geteuid() == 0 else ""
    text = SUPERVISORD.format(root=root, port=port, python=sys.executable, user=user, password=PASSWORD)
    (root / "supervisord.conf").write_text(text)
    names = {"backend": "grc-backend", "frontend": "broken", "redis": "no-such-program", "standby": "crashing"}
    services = SupervisorServices(
        names=names, url=f"http://127.0.0.1:{port}", username="ops", password=SecretStr(PASSWORD)
    )
    argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(root / "supervisord.conf")]

    def answers() -> bool:
        services.is_running("backend")
        return True

    with shell.spawn(argv, directory=root):
        until(answers, what="supervisord", seconds=120, every_seconds=0.05)
        yield services


def test_its_life(supervisor: SupervisorServices) -> None:
    assert supervisor.is_running("backend") is False
    supervisor.stop("backend")  # nothing happens
    supervisor.start("backend")
    assert supervisor.is_running("backend") is True
    supervisor.start("backend")  # nothing happens
    until(lambda: "候補者の行 499" in supervisor.logs("backend", 5), what="its output", seconds=120)
    assert supervisor.logs("backend", 3) == "候補者の行 497\n候補者の行 498\n候補者の行 499"
    for lines in range(1, 40):  # where a window of bytes begins inside a character
        assert len(supervisor.logs("backend", lines).splitlines()) == lines
    supervisor.stop("backend")
    assert supervisor.is_running("backend") is False


def test_whether_it_comes_back(supervisor: SupervisorServices) -> None:
    """A program that fails is started again, until supervisord gives it up."""
    assert supervisor.state("backend").comes_back is False
    assert supervisor.starts_at_boot("backend") == ""
    supervisor.start("backend")
    until(lambda: supervisor.state("backend").told == "RUNNING", what="its start", seconds=120)
    running = supervisor.state("backend")
    assert running.comes_back
    os.kill(running.pid, 0)
    supervisor.stop("backend")
    assert (supervisor.state("backend").told, supervisor.state("backend").comes_back) == ("STOPPED", False)
    supervisor.start("frontend")
    until(lambda: supervisor.state("frontend").told == "FATAL", what="that it is given up", seconds=120)
    assert supervisor.state("frontend").comes_back is False


def test_what_crashes_again_and_again_stays_stopped(
    supervisor: SupervisorServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It crashes when supervisord has the connection and not the request yet: there is nothing to stop, and it is
    started again."""
    supervisor.start("standby")
    pid, make = supervisor.state("standby").pid, _Transport.make_connection
    late = list[int]()

    def crashes_meanwhile(self: _Transport, host: object) -> http.client.HTTPConnection:
        connection = make(self, host)
        if not late:
            late.append(pid)
            connection.connect()
            until(lambda: not psutil.pid_exists(pid), what="its crash", seconds=120, every_seconds=0.01)
        return connection

    monkeypatch.setattr(_Transport, "make_connection", crashes_meanwhile)
    supervisor.stop("standby")
    assert late == [pid]
    assert supervisor.state("standby").told == "STOPPED"


def test_a_service_that_never_ran_has_no_log(supervisor: SupervisorServices) -> None:
    assert supervisor.logs("frontend") == ""


def test_a_service_that_does_not_start_is_told(supervisor: SupervisorServices) -> None:
    """`start` does not wait for it; whoever starts a service asks until a deadline whether it runs."""
    supervisor.start("frontend")
    with pytest.raises(OpsError, match="frontend does not start: frontend is stopped"):
        start_services.work(supervisor, ["frontend"], seconds=2.0)
    assert supervisor.is_running("frontend") is False


def test_a_role_that_the_environment_does_not_name(supervisor: SupervisorServices) -> None:
    for call in (supervisor.start, supervisor.stop, supervisor.is_running, supervisor.logs, supervisor.environment):
        with pytest.raises(OpsError) as error:
            call("postgres")
        assert error.value.message == "the environment names no service for postgres"
        assert error.value.hint == "add it under [services.names]"


def test_a_name_that_supervisord_does_not_know(supervisor: SupervisorServices) -> None:
    with pytest.raises(OpsError, match="supervisord refuses startProcess of no-such-program: BAD_NAME"):
        supervisor.start("redis")


def test_a_wrong_password_is_told_without_it(supervisor: SupervisorServices) -> None:
    wrong = supervisor.model_copy(update={"password": SecretStr("wr0ng")})
    with pytest.raises(OpsError) as error:
        wrong.is_running("backend")
    assert error.value.message == f"supervisord at {supervisor.url} answers 401 Unauthorized"
    assert not isinstance(error.value, Unreachable)
    assert "wr0ng" not in f"{error.value!r} {error.value.__context__ if not error.value.__suppress_context__ else ''}"


def test_a_supervisord_that_is_down_is_unreachable() -> None:
    services = SupervisorServices(names={"backend": "x"}, url=f"http://127.0.0.1:{free_port()}")
    for call in (services.start, services.stop, services.is_running, services.logs):
        with pytest.raises(Unreachable, match=r"^supervisord at http://127.0.0.1:\d+ does not answer"):
            call("backend")


def test_somebody_else_on_its_port_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def answer() -> None:
            with contextlib.suppress(OSError):  # closed: the test is over
                while True:
                    connection, _address = stranger.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"220 smtp ready\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        services = SupervisorServices(names={"backend": "x"}, url=f"http://127.0.0.1:{stranger.getsockname()[1]}")
        with pytest.raises(Unreachable):
            services.is_running("backend")
        stranger.shutdown(socket.SHUT_RDWR)


def test_a_supervisord_that_hangs_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.services.supervisor.READ_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        services = SupervisorServices(names={"backend": "x"}, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unreachable):
            services.is_running("backend")


def test_a_host_without_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OpsError, match="there is no program systemctl"):
        SystemdServices(names={"backend": "grc-backend"}).is_running("backend")


KILLED, FAILED = "exited: db (terminated by SIGKILL; not expected)", "exited: db (exit status 1; not expected)"
RUNS, STOPPED = (
    "success: db entered RUNNING state, process has stayed up for > than 1 seconds (startsecs)",
    ("stopped: db (exit status 0)"),
)


@pytest.mark.parametrize(
    ("lines", "ended"),
    [
        ([], ""),
        ([RUNS], ""),
        ([RUNS, KILLED], "terminated by SIGKILL; not expected"),
        ([RUNS, KILLED, FAILED, FAILED], "terminated by SIGKILL; not expected"),
        ([RUNS, KILLED, FAILED, RUNS], "terminated by SIGKILL; not expected"),
        ([RUNS, KILLED, RUNS, FAILED], "exit status 1; not expected"),
        ([RUNS, KILLED, RUNS, STOPPED], "exit status 0"),
        ([RUNS, STOPPED, KILLED], "terminated by SIGKILL; not expected"),
        ([RUNS, KILLED, "exited: db2 (exit status 7; expected)"], "terminated by SIGKILL; not expected"),
    ],
)
def test_a_start_that_fails_after_a_kill_is_not_how_the_program_ended(lines: list[str], ended: str) -> None:
    assert end_in("\n".join(f"2026-11-30 05:22:26,218 INFO {line}" for line in lines), "db") == ended
