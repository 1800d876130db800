"""A recovery that is cancelled while it stops PostgreSQL leaves the system as it found it, and says what runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import psycopg
import pytest

from lab.state.base import CHECKOUT
from runbook.wait import until
from tests.fixtures import forked
from tests.stranger.system import ADMIN_PASSWORD, NAME, Stranger, backed_up_stranger


@pytest.fixture(scope="module")
def system() -> Iterator[Stranger]:
    with backed_up_stranger() as found:
        yield found


def state_of(stranger: Stranger, program: str) -> str:
    return stranger.supervisor.services()[program].state


def calls(run: forked.Child, stranger: Stranger) -> set[int]:
    """The run's connections to the service manager, by their own ports."""
    found = psutil.Process(run.pid).net_connections("tcp4")
    return {one.laddr.port for one in found if one.raddr and one.raddr.port == stranger.ports["supervisor"]}


def test_while_postgresql_stops(system: Stranger, stranger: Stranger) -> None:
    """A frozen session keeps the server from its end, until the run has been cancelled."""
    stranger.sql("INSERT INTO users (email, name) VALUES ('last@example.org', 'Last')")
    before = stranger.content()
    session = psycopg.connect(
        host="127.0.0.1", port=stranger.ports["postgres"], user="postgres", password=ADMIN_PASSWORD, dbname="postgres"
    )
    backend = session.info.backend_pid
    words = ["-m", "flows.recovery.full_restore", "--environment", NAME, "--method", "cluster", "--confirm", NAME]
    environment = {**os.environ, **stranger.variables, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    run = forked.launch(words, environment, CHECKOUT, merge=True)
    os.kill(backend, signal.SIGSTOP)
    try:
        until(
            lambda: run.poll() is not None or state_of(stranger, "database") == "STOPPING",
            what="the stop of PostgreSQL",
            seconds=120,
            every_seconds=0.01,
        )
        asked = calls(run, stranger)
        run.send_signal(signal.SIGTERM)
        until(lambda: calls(run, stranger) - asked, what="the cancelled run's next call", seconds=120)
    finally:
        os.kill(backend, signal.SIGCONT)
    output, _ = run.communicate(timeout=120)
    session.close()
    assert run.returncode == -signal.SIGTERM, output
    assert {name: found.state for name, found in stranger.supervisor.services().items()} == dict.fromkeys(
        ("database", "keys", "members", "receiver"), "RUNNING"
    )
    until(stranger.ready, what="the application", seconds=120)
    assert stranger.content() == before
    findings = [(one["name"], one["value"]) for one in stranger.report()["findings"]]
    started = [value for name, value in findings if name == "services started again"]
    assert started == ["running: postgres, receiver, redis, backend"], "each once"
    assert ("state of the system", "nothing live was replaced; services are as they were found") in findings
