"""The Services block of containers, on a real engine."""

from __future__ import annotations

import os
import signal

import pytest

from blocks.services.service import MASK, DockerServices
from runbook.errors import OpsError
from runbook.wait import until
from tasks.host.restarts import LastEnd, manager_end
from tests.fixtures.engine import Engine

pytestmark = pytest.mark.system


def test_a_container_is_started_stopped_and_looked_at(engine: Engine) -> None:
    script = "echo began; trap 'echo ended; exit 0' TERM; while true; do sleep 0.1; done"
    engine.run("backend", "sh", "-c", script, environment={"TOKEN": "secret-value"})
    services = DockerServices(host=engine.host, stop_seconds=30, names={"backend": f"{engine.prefix}-backend"})
    assert services.is_running("backend")
    assert services.state("backend").comes_back
    assert services.state("backend").pid > 0
    until(lambda: "began" in services.logs("backend"), what="its first line", seconds=120)
    services.stop("backend")
    services.stop("backend")
    assert not services.is_running("backend")
    assert services.logs("backend", lines=1).strip() == "ended", "it was asked, not killed"
    state = services.state("backend")
    assert (state.told, state.pid, state.comes_back) == ("exited, restart: no", 0, False)
    services.restart("backend")
    assert services.is_running("backend")
    assert services.environment("backend")["TOKEN"] == MASK
    assert "secret-value" not in str(services.environment("backend"))


def test_a_container_that_waits_for_its_restart_comes_back(engine: Engine) -> None:
    engine.run("backend", "false", restart_policy={"Name": "always"})
    services = DockerServices(host=engine.host, names={"backend": f"{engine.prefix}-backend"})
    until(lambda: "restarting" in services.state("backend").told, what="a wait", seconds=120)
    assert services.state("backend").comes_back
    assert services.starts_at_boot("backend") == "restart: always"
    services.stop("backend")
    assert services.starts_at_boot("backend"), "stopped is not enough"
    services.disable("backend")
    assert services.starts_at_boot("backend") == ""
    assert "docker update --restart" in services.enable("backend")


def test_an_end_that_nobody_asked_for_is_known_until_somebody_restarts_it(engine: Engine) -> None:
    container = engine.run("backend", restart_policy={"Name": "always"})
    services = DockerServices(host=engine.host, names={"backend": f"{engine.prefix}-backend"})
    assert manager_end(services.last_end("backend")) == LastEnd("started by its manager")
    pid = services.state("backend").pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: services.state("backend").pid not in (0, pid), what="its restart", seconds=120)
    end = manager_end(services.last_end("backend"))
    assert end == LastEnd("unexpected", "exited unexpectedly: its restart policy has started it 1 time")
    services.restart("backend")
    assert manager_end(services.last_end("backend")).how == "started by its manager"
    container.kill()
    services.start("backend")
    assert manager_end(services.last_end("backend")).how == "started by its manager", "docker kill is a person's"


def test_an_unknown_container_is_told(engine: Engine) -> None:
    services = DockerServices(host=engine.host, names={"backend": "nobody"})
    with pytest.raises(OpsError, match="knows no container nobody — correct it under"):
        services.start("backend")
