"""diagnose-application: each cause in pairs; the first finding is the true cause, and its hint mends it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from runbook.report import Status
from runbook.wait import until
from tasks.application import health
from tests.troubleshooting.conftest import Host, cause
from tests.troubleshooting.seeds import Faults, assert_order, carry_out
from tests.troubleshooting.test_application import ALEMBIC, MAIN, Backend

LAB = Path(__file__).parents[2] / "lab" / "application"
DATABASE, REDIS, UNWELL = "the database of the application", "the Redis of the application", "runs but is unhealthy"
IMPORT, STOPPED, MIGRATION = "an import fails", "backend is stopped", "a migration is missing"
RESTARTED, TAKEN, HALTED = "the process before it ended without a shutdown", "the port of backend is taken", "SIGSTOP"
PAIRS = [  # what is seeded → what is found first, what comes next, a part of the first hint
    (("unwell", "postgres_dead"), DATABASE, UNWELL, "fix the database first"),
    (("unwell", "redis_dead"), REDIS, UNWELL, "fix Redis first"),
    (("postgres_dead", "broken_import"), DATABASE, IMPORT, "fix the database first"),
    (("stopped", "postgres_dead"), DATABASE, STOPPED, "fix the database first"),
    (("stopped", "redis_dead"), REDIS, STOPPED, "fix Redis first"),
    (("port_taken", "broken_import"), TAKEN, IMPORT, "find out what it is"),
    (("unwell", "migration_missing"), MIGRATION, UNWELL, "rehearse and apply the migrations"),
    (("halted", "migration_missing"), HALTED, MIGRATION, "kill -CONT"),
    (("stopped",), STOPPED, "", "supervisorctl start grc-backend"),
]


class ApplicationFaults(Faults):
    """Those of the application too. It runs and is healthy before a fault is seeded, where the fault is not that it
    does not start."""

    def __init__(self, backend: Backend, directory: Path, request: pytest.FixtureRequest) -> None:
        super().__init__(backend.host, directory, request)
        self.backend = backend
        self.describe(url=backend.url)

    @contextlib.contextmanager
    def unwell(self) -> Iterator[None]:
        self.backend.start()
        (self.host.backend / "unwell").touch()
        yield

    @contextlib.contextmanager
    def broken_import(self) -> Iterator[None]:
        self.backend.write(main="import interviewkit_that_is_gone\n" + MAIN)
        self.backend.start_in_vain()
        yield

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        (self.host.root / "grc-backend.log").write_text("")
        yield

    @contextlib.contextmanager
    def port_taken(self) -> Iterator[None]:
        with contextlib.closing(socket.create_server(("127.0.0.1", self.host.backend_port))):
            yield

    @contextlib.contextmanager
    def migration_missing(self) -> Iterator[None]:
        for name, text in ALEMBIC.items():
            path = self.host.backend / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        yield

    @contextlib.contextmanager
    def halted(self, role: str = "backend") -> Iterator[None]:  # type: ignore[override]
        if role == "backend":
            self.backend.start()
        with super().halted(role):
            yield

    def running_killed(self) -> AbstractContextManager[object]:
        self.backend.start()
        return self.killed("backend")


@pytest.fixture
def faults(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ApplicationFaults]:
    monkeypatch.setattr(health, "ONCE_SECONDS", 0.5)
    backend = Backend(host)
    backend.write()
    try:
        yield ApplicationFaults(backend, tmp_path, request)
    finally:
        host.services.stop("backend")
        shutil.rmtree(host.backend / "alembic", ignore_errors=True)
        for name in ("alembic.ini", "unwell"):
            (host.backend / name).unlink(missing_ok=True)


@pytest.mark.parametrize(("seeds", "first", "second", "hint"), PAIRS, ids=["+".join(one[0]) for one in PAIRS])
def test_the_first_finding_is_the_true_cause(
    faults: ApplicationFaults, seeds: tuple[str, ...], first: str, second: str, hint: str
) -> None:
    faults.diagnose(faults.backend.diagnosed, seeds, first, second, hint)


def test_a_process_that_was_killed_is_found_by_its_age(faults: ApplicationFaults) -> None:
    with contextlib.ExitStack() as stack:
        faults.open(stack, "running_killed")
        until(faults.backend.answers, what="the backend", seconds=120)
        report = faults.backend.diagnosed()
        assert report.status is Status.WARN
        assert_order(report, RESTARTED)
        assert "terminated by SIGKILL; not expected" in cause(report)
        (faults.host.backend / "unwell").touch()
        assert_order(faults.backend.diagnosed(), UNWELL, RESTARTED)
        (faults.host.backend / "unwell").unlink()
    until(faults.backend.answers, what="the backend", seconds=120)
    assert faults.backend.diagnosed().status is Status.OK, "an orderly restart is none"


def test_a_missing_migration_is_mended_by_the_linked_runbook(faults: ApplicationFaults) -> None:
    later = shutil.ignore_patterns("__pycache__", "000[2-9]*")
    shutil.copytree(LAB / "alembic", faults.host.backend / "alembic", ignore=later)
    shutil.copy(LAB / "alembic.ini", faults.host.backend)
    faults.backend.start()
    try:
        report = faults.backend.diagnosed()
        assert_order(report, MIGRATION)
        assert carry_out(report).facts["Alembic revision"].startswith("none")
        after = faults.backend.diagnosed()
        assert after.status is Status.OK, cause(after)
    finally:
        faults.host.server.drop_database("grc_db")
        faults.host.server.create_database("grc_db")
