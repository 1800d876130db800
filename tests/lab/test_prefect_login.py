"""Who reaches the lab's Prefect: its worker runs commands for whoever has its API, as root where root starts the lab."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from lab import control as lab_control
from lab.control import LabControl
from lab.processes import MARK
from lab.state import state
from lab.state.environment import api_url
from tests.fixtures.servers import separate_base
from tests.runbook.processes import prefect_server

__all__ = ["prefect_server"]

STRANGER = """
import http.client, sys
port, *files = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
connection.request("POST", "/api/deployments/filter", "{}", {"Content-Type": "application/json"})
print(connection.getresponse().status)
for file in files:
    try:
        open(file).read()
        print("read", file)
    except OSError as error:
        print(error.strerror)
"""
NOBODY = 65534


def removed(control: LabControl) -> None:
    control.shutdown()
    shutil.rmtree(control.layout.base)


@pytest.fixture
def own() -> LabControl:
    return LabControl.find(Path(os.environ["OPS_LAB_BASE"])) or pytest.fail("there is no Prefect")


def test_another_local_user_launches_nothing_and_reads_no_password(prefect_server: str, own: LabControl) -> None:
    """Privileges dropped to an account without any."""
    holding = [own.layout.state, own.layout.supervisor]
    argv = ["/usr/bin/python3", "-c", STRANGER, str(own.state.port), *map(str, holding)]
    done = subprocess.run(argv, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", text=True, capture_output=True)
    assert done.stdout.split("\n") == ["401", *["Permission denied"] * len(holding), ""], done.stderr
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in holding)


def test_a_page_of_another_origin_is_not_allowed_to_read_or_send(prefect_server: str, own: LabControl) -> None:
    def allowed(origin: str) -> list[str | None]:
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,content-type"
        address = f"{prefect_server}/deployments/filter"
        answers = (
            httpx.options(address, headers=preflight, timeout=120, trust_env=False),
            httpx.post(
                address, json={}, headers={"Origin": origin}, auth=own.state.login, timeout=120, trust_env=False
            ),
        )
        return [answer.headers.get("access-control-allow-origin") for answer in answers]

    for stranger in ("https://example.com", "http://127.0.0.1:1", "null"):
        assert allowed(stranger) == [None, None], stranger
    page = f"http://localhost:{own.state.port}"
    assert allowed(page) == [page, page], "the UI, under its other name"


def test_its_password_is_in_no_argument_and_no_log(prefect_server: str, own: LabControl) -> None:
    password = own.state.password
    ours = [process for process in psutil.process_iter() if carries_mark(process, own)]
    assert ours
    assert not [process.cmdline() for process in ours if password in " ".join(process.cmdline())]
    assert not [log for log in own.layout.logs.iterdir() if password in log.read_text(errors="replace")]


def carries_mark(process: psutil.Process, own: LabControl) -> bool:
    try:
        return process.environ().get(MARK) == str(own.layout.supervisor)
    except psutil.Error:
        return False


@pytest.fixture
def bases() -> Iterator[list[Path]]:
    """Of two checkouts."""
    with ExitStack() as stack:
        yield [stack.enter_context(separate_base(name)) for name in ("checkout-one", "checkout-two")]


def test_two_checkouts_at_once_get_two_prefects(bases: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both chose the usual port while nobody listened there: the second attached to the first one's Prefect."""
    usual = state.free_port(lab_control.taken_ports(bases[0]))
    monkeypatch.setattr(lab_control, "_USUAL_PORT", usual)
    with monkeypatch.context() as patch:
        patch.delenv("OPS_LAB_BASE")
        prepared = [LabControl.prepare(base) for base in bases]
    assert [control.state.port for control in prepared] == [usual, usual]
    launched = [control.launch() for control in prepared]
    try:
        assert [control.state.port for control in launched] == [usual, usual], "nobody listened yet"
        waiting = [threading.Thread(target=control.wait) for control in launched]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        one, two = (LabControl.find(base) or pytest.fail("lost") for base in bases)
        assert one.is_healthy()
        assert two.is_healthy()
        assert one.state.port != two.state.port
        one.create_pool("only-one")
        for mine, other in ((one, two), (two, one)):
            found = httpx.post(
                f"{api_url(mine.state)}/work_pools/filter", json={}, auth=other.state.login, trust_env=False
            )
            assert found.status_code == httpx.codes.UNAUTHORIZED
        found = httpx.get(f"{api_url(two.state)}/work_pools/only-one", auth=two.state.login, trust_env=False)
        assert found.status_code == httpx.codes.NOT_FOUND
    finally:
        for control in (LabControl.find(base) for base in bases):
            if control:
                removed(control)


@contextmanager
def agreeable_server(port: int) -> Iterator[list[str]]:
    """Answers 200 and `true` to everything; yields the log-ins that it was sent."""
    got: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.extend(self.headers.get_all("Authorization", []))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"true")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield got
        server.shutdown()


def test_a_stranger_on_the_port_is_sent_no_password(bases: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases[0]
    prepared = LabControl.prepare(base)
    try:
        with agreeable_server(prepared.state.port) as got:
            with monkeypatch.context() as patch:  # it came between the choice of the port and the server's start
                patch.setattr(lab_control, "is_free", lambda port: True)
                launched = prepared.launch()
            ready = launched.wait()
            assert ready.state.port != prepared.state.port
            assert ready.is_healthy()
            assert not launched.is_healthy()
            assert got == []
    finally:
        removed(LabControl.find(base) or prepared)


def test_the_login_is_printed_once(bases: list[Path]) -> None:
    base = bases[0]
    shell = {**os.environ, "OPS_LAB_BASE": str(base)}
    LabControl.prepare(base)
    password = (LabControl.find(base) or pytest.fail("lost")).state.password
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], env=shell, text=True, capture_output=True, check=True, timeout=120
    )
    first, again = re.split("^again$", done.stdout, flags=re.MULTILINE)
    assert f"ops:{password}" not in again
    assert re.search(r"^Log in with: ops:[0-9a-f]{32}$", first, flags=re.MULTILINE)
    shutil.rmtree(base)


PRINTS = """
import shutil
from lab import cli, lifecycle
from lab.control import LabControl
from lab.state.base import base_directory
shutil.rmtree(base_directory())
lifecycle.up = lambda *words, **more: LabControl.prepare(base_directory())
cli.main(["up"])
print("again")
cli.main(["up"])
"""
