"""The Services block of systemd, on a real one, by ssh: `systemctl --host` as a worker on another machine uses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.services.service import MASK
from blocks.services.systemd import SystemdServices
from lab.processes import run
from lab.state.base import CHECKOUT, PYTHON
from runbook.errors import OpsError, Unreachable
from runbook.wait import until
from tasks.host.restarts import LastEnd, manager_end
from tasks.monitoring import state
from tests.fixtures.engine import Engine
from tests.fixtures.servers import free_port
from tests.system.hosts import NAME, UNITS, SystemdHost, new_host
from tests.system.image import host_engine

__all__ = ["host_engine"]
pytestmark = pytest.mark.system
NAMES = {"postgres": "postgresql", "redis": "redis", "backend": "grc-backend", "frontend": "nobody"}
WAIT_SECONDS = 120
LATER = "[Service]\nRestart=always\nRestartSec=1h\n"
WATCHED = """
name = "{name}"
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[services]
kind = "systemd"
names = {{ redis = "redis-server" }}
"""
CONFIG = """
Host app-1
    HostName 127.0.0.1
    Port {port}
    User root
    IdentityFile {key}
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


@pytest.fixture(scope="module")
def host(host_engine: Engine) -> Iterator[SystemdHost]:
    """Its backend runs, and does not know a database."""
    with new_host(SystemdHost, host_engine) as booting:
        backend = booting.application / "backend" / "grc_backend"
        backend.mkdir(parents=True)
        (backend / "__main__.py").write_text("import time; print('ready', flush=True); time.sleep(3600)\n")
        booting.boot()
        yield booting


@pytest.fixture(scope="module")
def ssh(host: SystemdHost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an `ssh` that knows the host as app-1."""
    directory = tmp_path_factory.mktemp("ssh")
    key = directory / "key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    port = host.log_in_with(key.with_suffix(".pub").read_text())
    (directory / "config").write_text(CONFIG.format(port=port, key=key))
    program = directory / "ssh"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory}/config "$@"\n')
    program.chmod(0o755)
    return directory


@pytest.fixture
def services(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> SystemdServices:
    monkeypatch.setenv("PATH", f"{ssh}:{os.environ['PATH']}")
    return SystemdServices(names=NAMES, host="app-1")


def test_a_unit_is_started_stopped_and_looked_at(host: SystemdHost, services: SystemdServices) -> None:
    assert services.is_running("backend")
    state = services.state("backend")
    assert state.comes_back
    assert "grc_backend" in host.program("cat", f"/proc/{state.pid}/cmdline").text
    # It and systemd both say that it has begun; its own word may come first.
    until(lambda: "]: ready" in services.logs("backend", lines=2), what="its first line", seconds=WAIT_SECONDS)
    services.stop("backend")
    services.stop("backend")
    assert not services.is_running("backend")
    assert host.active("grc-backend") == "inactive"
    stopped = services.state("backend")
    assert (stopped.told, stopped.pid, stopped.comes_back) == ("inactive (dead), enabled", 0, False)
    services.start("backend")
    services.start("backend")
    assert services.is_running("backend")
    before = services.state("backend").pid
    services.restart("backend")
    assert services.state("backend").pid not in (0, before)


def test_the_environment_has_names_and_no_values(services: SystemdServices) -> None:
    assert services.environment("backend") == {"LANG": MASK, "PAGE_TITLE": MASK, "TOKEN": MASK}


def test_a_unit_without_a_process_means_the_one_that_is_part_of_it(
    host: SystemdHost, services: SystemdServices
) -> None:
    """Debian's postgresql is active while no server runs."""
    pid = services.state("postgres").pid
    assert host.program("cat", f"/proc/{pid}/comm").text.strip() == "postgres"
    host.kill("postgres")
    assert host.active("postgresql") == "active"
    assert not services.is_running("postgres")
    assert not services.state("postgres").comes_back
    services.start("postgres")
    assert services.is_running("postgres")
    services.stop("postgres")
    assert host.active(UNITS["postgres"]) == "inactive", "what still ends has not ended"
    assert not services.is_running("postgres")
    services.start("postgres")
    assert "postgresql@17-main" in services.logs("postgres")


def test_a_unit_that_was_given_up_is_started(host: SystemdHost, services: SystemdServices) -> None:
    with host.broken("backend"):
        host.kill("backend")
        assert not services.state("backend").comes_back
    assert host.program("systemctl", "start", "grc-backend").code, "for an hour, systemd itself would not"
    services.start("backend")
    assert services.is_running("backend")


def test_a_unit_that_waits_for_its_restart_comes_back(host: SystemdHost, services: SystemdServices) -> None:
    host.put("/etc/systemd/system/redis-server.service.d/later.conf", LATER)
    host.program("systemctl", "daemon-reload")
    host.program("systemctl", "kill", "--signal=KILL", "redis-server")
    until(lambda: "auto-restart" in services.state("redis").told, what="its wait", seconds=WAIT_SECONDS)
    assert not services.is_running("redis")
    assert services.state("redis").comes_back
    services.stop("redis")
    assert not services.state("redis").comes_back
    services.start("redis")
    assert services.is_running("redis")


def test_an_end_that_nobody_asked_for_is_known_until_somebody_restarts_it(
    host: SystemdHost, services: SystemdServices
) -> None:
    services.restart("backend")
    assert manager_end(services.last_end("backend")) == LastEnd("started by its manager")
    pid = services.state("backend").pid
    host.program("kill", "-9", str(pid))
    until(lambda: services.state("backend").pid not in (0, pid), what="its restart", seconds=WAIT_SECONDS)
    end = manager_end(services.last_end("backend"))
    assert end == LastEnd("unexpected", "exited unexpectedly: systemd has started it again 1 time")
    services.restart("backend")
    assert manager_end(services.last_end("backend")).how == "started by its manager"


def test_a_disabled_unit_is_not_started_at_boot_until_it_is_enabled(
    host: SystemdHost, services: SystemdServices
) -> None:
    """Debian's instance is wanted by postgresql.service, and masked. The backend's own file is in the mask's place."""
    for role, expected in (("postgres", "masked"), ("backend", "disabled")):
        assert services.starts_at_boot(role)
        services.stop(role)
        assert services.starts_at_boot(role), "stopped is not enough"
        services.disable(role)
        services.stop(role)  # nothing happens
        assert services.starts_at_boot(role) == ""
        assert host.program("systemctl", "is-enabled", UNITS[role]).text.strip() == expected
        host.program("systemctl", "start", "postgresql")
        assert not services.is_running(role)
        if expected == "masked":
            with pytest.raises(OpsError, match="is masked"):
                services.start(role)
        left = services.enable(role)
        assert ("systemctl enable grc-backend" in left) == (expected == "disabled")
        host.program("systemctl", "enable", "grc-backend")
        services.start(role)
        assert services.is_running(role)
        assert services.starts_at_boot(role)


def test_a_role_of_another_host_is_reached_there_and_one_of_this_machine_here(services: SystemdServices) -> None:
    apart = SystemdServices(names=NAMES, hosts={"backend": "app-1", "redis": "root@127.0.0.1"})
    assert apart.state("backend").pid == services.state("backend").pid
    assert apart._host("backend") == "app-1"
    assert apart._host("redis") == apart._host("postgres") == ""


def test_a_unit_that_systemd_does_not_know_is_no_stopped_one(services: SystemdServices) -> None:
    for ask in (services.is_running, services.state, services.start, services.stop):
        with pytest.raises(OpsError, match="systemd knows no unit nobody — correct it under"):
            ask("frontend")


def test_our_own_units_run(host: SystemdHost) -> None:
    """deployments/*.service as they are, with the checkout where it is here. A Prefect that is away stops neither."""
    configuration = host.base / f"{NAME}.toml"
    configuration.write_text(WATCHED.format(name=NAME, reports=host.base / "reports"))
    worker = {**host.variables, "OPS_WORK_POOL": NAME, "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    for name, values in (("worker", worker), ("secrets", {})):
        host.put(f"/etc/interview-ops/{name}.env", "".join(f"{key}={value}\n" for key, value in values.items()))
    for name in ("worker", "watcher"):
        unit = f"/etc/systemd/system/interview-ops-{name}.service"
        text = (CHECKOUT / "deployments" / f"{name}.service").read_text()
        text = text.replace("/opt/interview-ops/.venv/bin/python", str(PYTHON))
        host.put(unit, text.replace("/opt/interview-ops", str(CHECKOUT)))
        checked = host.program("systemd-analyze", "verify", unit)
        assert (checked.code, f"interview-ops-{name}" in checked.text) == (0, False), checked.text
        started = host.program("systemctl", "start", f"interview-ops-{name}")
        assert not started.code, started.text

    def watched() -> bool:
        assert host.active("interview-ops-watcher") in ("active", "activating")
        return bool(state.load(host.base / "reports").at)

    try:
        until(watched, what="a round of the monitoring", seconds=WAIT_SECONDS)
    except Unreachable:
        pytest.fail(host.program("journalctl", "--unit", "interview-ops-watcher", "--no-pager").text)
    assert host.active("interview-ops-worker") == "active"
    assert host.program("systemctl", "show", "interview-ops-worker", "--property=NRestarts", "--value").text == "0\n"
    for name in ("worker", "watcher"):
        assert not host.program("systemctl", "stop", f"interview-ops-{name}").code
        told = host.program("systemctl", "show", f"interview-ops-{name}", "--property=Result", "--value").text
        assert told == "success\n", host.program("journalctl", "--unit", f"interview-ops-{name}").text
    assert "flows were ended" in host.program("journalctl", "--unit", "interview-ops-worker").text


def test_a_host_that_cannot_be_reached_is_told(services: SystemdServices) -> None:
    elsewhere = services.model_copy(update={"host": "nowhere.invalid"})
    for ask in (elsewhere.is_running, elsewhere.start, elsewhere.logs):
        with pytest.raises(Unreachable, match="nowhere.invalid"):
            ask("backend")
