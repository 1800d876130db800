"""What starts a unit that is stopped and disabled, on a real systemd: a fence counts all of it, and says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.services.systemd import SystemdServices
from runbook.wait import until
from tests.fixtures.engine import Engine
from tests.system.hosts import SystemdHost, new_host
from tests.system.image import host_engine
from tests.system.test_systemd_services import CONFIG, ssh

__all__ = ["CONFIG", "host_engine", "ssh"]
pytestmark = pytest.mark.system
SLEEP = "[Service]\nExecStart=/bin/sleep infinity\n"
INSTALL = "[Install]\nWantedBy=multi-user.target\n"
OWN, PACKAGED, STARTER = "own-db.service", "packaged-db.service", "starter.service"
BROKEN = "[Service]\nExecStart=/bin/false\n"


@pytest.fixture(scope="module")
def host(host_engine: Engine) -> Iterator[SystemdHost]:
    """The administrator's own unit, and one of a package."""
    with new_host(SystemdHost, host_engine) as booting:
        booting.boot()
        booting.put(f"/etc/systemd/system/{OWN}", SLEEP + INSTALL)
        booting.put(f"/usr/lib/systemd/system/{PACKAGED}", SLEEP + INSTALL)
        yield booting


@pytest.fixture
def services(host: SystemdHost, ssh: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SystemdServices]:
    monkeypatch.setenv("PATH", f"{ssh}:{os.environ['PATH']}")
    host.program("systemctl", "daemon-reload")
    yield SystemdServices(names={"postgres": "own-db", "standby": "packaged-db"}, host="app-1")
    for unit in (STARTER, "starter.timer", "other.service"):
        host.program("systemctl", "disable", "--now", unit)
        host.program("rm", "-f", f"/etc/systemd/system/{unit}")
    host.program("rm", "-rf", f"/etc/systemd/system/{OWN}.d")
    host.program("systemctl", "unmask", PACKAGED)
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "stop", OWN, PACKAGED)
    host.program("systemctl", "reset-failed")


def carry_out(host: SystemdHost, hint: str) -> None:
    """The commands of a hint, as a person pastes them."""
    for command in hint.removeprefix("there: ").split("; "):
        done = host.program(*command.split())
        assert not done.code, done.text


@pytest.mark.parametrize("relation", ["Wants", "Requires", "BindsTo", "Upholds", "OnFailure", "OnSuccess"])
def test_a_unit_that_an_enabled_one_starts_is_not_fenced(
    host: SystemdHost, services: SystemdServices, relation: str
) -> None:
    host.put(f"/etc/systemd/system/{STARTER}", f"[Unit]\n{relation}={OWN}\n{SLEEP}{INSTALL}")
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "enable", STARTER)
    services.disable("postgres")
    assert services.starts_at_boot("postgres") == f"disabled, started by {STARTER} ({relation}=)"
    assert not services.stays_disabled("postgres")
    carry_out(host, services.how_to_disable("postgres"))
    assert services.starts_at_boot("postgres") == ""


def test_what_it_would_be_fenced_from_really_starts_it(host: SystemdHost, services: SystemdServices) -> None:
    """BindsTo= starts a disabled unit with its starter, OnFailure= when that one fails, Upholds= again and again."""
    for text in (f"[Unit]\nBindsTo={OWN}\n{SLEEP}", f"[Unit]\nOnFailure={OWN}\n{BROKEN}"):
        host.put(f"/etc/systemd/system/{STARTER}", text)
        host.program("systemctl", "daemon-reload")
        host.program("systemctl", "start", STARTER)
        until(lambda: services.is_running("postgres"), what="its start", seconds=60)
        host.program("systemctl", "stop", STARTER)
        services.stop("postgres")
    host.put(f"/etc/systemd/system/{STARTER}", f"[Unit]\nUpholds={OWN}\n{SLEEP}")
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "start", STARTER)
    until(lambda: services.is_running("postgres"), what="its start", seconds=60)
    host.put(f"/etc/systemd/system/{OWN}.d/broken.conf", "[Service]\nExecStart=\nExecStart=/bin/false\n")
    host.program("systemctl", "daemon-reload")
    services.stop("postgres")
    until(lambda: services.state("postgres").told.startswith("failed"), what="its failed starts", seconds=60)
    state = services.state("postgres")
    assert (state.comes_back, state.told.endswith(f"kept up by {STARTER} (Upholds=)")) == (True, True), state


def test_a_starter_that_a_timer_starts_counts_and_one_that_nothing_starts_does_not(
    host: SystemdHost, services: SystemdServices
) -> None:
    host.put(f"/etc/systemd/system/{STARTER}", f"[Unit]\nBindsTo={OWN}\n{SLEEP}")
    host.put("/etc/systemd/system/other.service", f"[Unit]\nOnFailure={OWN}\nAfter={STARTER}\n{SLEEP}")
    host.put("/etc/systemd/system/starter.timer", f"[Timer]\nOnActiveSec=1d\n{INSTALL}")
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "enable", "--now", "starter.timer")
    services.disable("postgres")
    assert services.starts_at_boot("postgres") == f"disabled, started by {STARTER} (BindsTo=)"
    hint = services.how_to_disable("postgres")
    assert hint == "there: systemctl disable --now own-db starter.timer"
    carry_out(host, hint)
    assert services.starts_at_boot("postgres") == ""


def test_a_masked_unit_is_started_by_none(host: SystemdHost, services: SystemdServices) -> None:
    host.put(f"/etc/systemd/system/{STARTER}", f"[Unit]\nBindsTo={PACKAGED}\n{SLEEP}{INSTALL}")
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "enable", STARTER, PACKAGED)
    assert services.starts_at_boot("standby").startswith("enabled, started by multi-user.target (Wants=), ")
    assert services.stays_disabled("standby")
    assert services.how_to_disable("standby") == "there: systemctl mask packaged-db"
    services.disable("standby")
    assert services.starts_at_boot("standby") == ""
    assert host.program("systemctl", "start", STARTER).code
    assert not services.is_running("standby")
