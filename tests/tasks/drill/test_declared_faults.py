"""Faults that a file declares: each really made and ended, and refused where it cannot be made."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from blocks.environment import Environment
from blocks.services.service import DockerServices
from blocks.services.supervisor import SupervisorServices
from blocks.services.systemd import SystemdServices
from runbook.change import Change, carrying_out
from runbook.current import use_report
from runbook.errors import NotConfirmed, OpsError
from runbook.guard.effect import Effect
from runbook.report import Report
from tasks.faults.declared import FILLING, DeclaredFault, heal_declared, read_obstacle, strike_declared
from tasks.faults.disposable import BREAK, Fault
from tasks.faults.relay import Relay
from tests.fixtures.servers import free_port


def disposable(name: str = "trial", *, disposable: bool = True) -> Environment:
    return Environment(name=name, disposable=disposable, rpo_seconds=1, rto_seconds=1)


def struck(env: Environment, fault: DeclaredFault, planned: DeclaredFault | None = None) -> Fault:
    """A fault that a plan has, or that another one smuggles in."""
    report, action = Report("DR drill", env.name, env.name), strike_declared.bind(env, fault)
    by = strike_declared.bind(env, planned) if planned else action
    breaking = Change(lambda: action(), BREAK, fault.text, by=[by])
    with use_report(report), carrying_out(report, breaking, effect=Effect("it fails", "")) as carry:
        return carry(breaking)


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that returns what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=lambda one=one: _echo(one), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _echo(one: socket.socket) -> None:
    with one:
        while data := one.recv(1024):
            one.sendall(data)


def asked(connection: socket.socket, seconds: float = 60) -> float:
    """How long an answer took, in seconds."""
    connection.settimeout(seconds)
    began = time.monotonic()
    connection.sendall(b"ping")
    assert connection.recv(1024) == b"ping"
    return time.monotonic() - began


def test_a_relay_slows_hangs_and_refuses_and_is_ended(echo: int) -> None:
    listen, control = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    env, url = disposable(), f"http://127.0.0.1:{control[1]}"
    slow = DeclaredFault(kind="latency", control=url, delay_seconds=0.3)
    hung, refused = (DeclaredFault(kind=kind, control=url) for kind in ("timeout", "refused"))  # type: ignore[arg-type]
    assert "python -m tasks.faults.relay" in read_obstacle(env, slow)
    with Relay(listen, ("127.0.0.1", echo), control) as relay:
        assert read_obstacle(env, slow) == "the application does not connect through the relay"
        with socket.create_connection(listen) as one:
            assert asked(one) < 60
            assert read_obstacle(env, slow) == ""
            with pytest.raises(NotConfirmed, match="is not in this run's permit"):
                struck(env, slow, planned=slow.model_copy(update={"control": "http://127.0.0.1:1"}))
            with pytest.raises(NotConfirmed, match="is not carried out by a plan"):
                strike_declared.bind(env, slow)()
            assert relay.fault is None
            assert struck(env, slow).what == f"latency (0.3 s) at the relay {url}"
            assert read_obstacle(env, slow) == "the relay has a fault already: latency"
            assert asked(one) >= 0.6, "both ways"
            heal_declared(env, slow)
            struck(env, hung)
            with pytest.raises(TimeoutError):
                asked(one, 0.2)
            heal_declared(env, hung)
            assert one.recv(1024) == b"ping", "late, and not lost"
            struck(env, refused)
            with pytest.raises(ConnectionError):
                socket.create_connection(listen)
            one.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b"", "what was open has ended"
        heal_declared(env, refused)
        heal_declared(env, refused)
        with socket.create_connection(listen) as again:
            asked(again)
        for wrong in ({}, {"failing": True, "fault": "explode"}):
            assert httpx.post(f"{url}/control/relay", json=wrong, timeout=60).status_code == 400


def test_what_cannot_be_made_is_refused_with_the_reason(tmp_path: Path) -> None:
    env = disposable()
    wrong_clock = DeclaredFault(kind="clock", service="backend", ahead_seconds=-7200, directory=str(tmp_path))
    assert wrong_clock.text == "the clock of backend is 2 h 00 min behind"
    for services, told in (
        (DockerServices(names={"backend": "grc"}), "gives grc its variables when it creates the container"),
        (SystemdServices(names={"backend": "grc"}), "it would take a drop-in with Environment=LD_PRELOAD"),
        (SystemdServices(names={"backend": "grc"}, host="root@db2"), "the service manager is on another host"),
        (SupervisorServices(names={"backend": "grc"}, url="http://127.0.0.1:9"), "supervisord at .* does not answer"),
    ):
        assert re.search(told, read_obstacle(env.derived({"services": services}, reports=tmp_path), wrong_clock))
    full = DeclaredFault(kind="full_disk", directory=str(tmp_path))
    assert "is not a mount point" in read_obstacle(env, full)
    with pytest.raises(OpsError, match="is not a mount point"):
        struck(env, full)
    assert list(tmp_path.iterdir()) == []
    assert "proxy is not set" in read_obstacle(env, DeclaredFault(kind="provider"))
    production = disposable("production", disposable=False)
    for call in (read_obstacle, heal_declared):
        with pytest.raises(OpsError, match="production is not disposable"):
            call(production, full)
    for wrong in (
        {"kind": "latency", "control": "http://127.0.0.1:1"},
        {"kind": "refused"},
        {"kind": "flood"},
        {"kind": "full_disk", "directory": "data"},
        {"kind": "clock", "service": "backend", "ahead_seconds": 59},
        {"kind": "clock", "ahead_seconds": 7200},
    ):
        with pytest.raises(ValidationError):
            DeclaredFault.model_validate(wrong)


@pytest.mark.system
def test_a_small_file_system_is_filled_and_emptied(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    try:
        (tmp_path / "own").write_bytes(b"x" * 1000)
        env, full = disposable(), DeclaredFault(kind="full_disk", directory=str(tmp_path), leave_bytes=65536)
        assert read_obstacle(env, full) == ""
        struck(env, full)
        assert shutil.disk_usage(tmp_path).free <= 65536
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "more").write_bytes(b"x" * 200_000)
        (tmp_path / "more").unlink()
        heal_declared(env, full)
        assert shutil.disk_usage(tmp_path).free > 7_000_000
        assert not (tmp_path / FILLING).exists()
        assert (tmp_path / "own").stat().st_size == 1000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
