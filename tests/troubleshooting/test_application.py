"""diagnose-application: each cause of a real application under a real supervisord is named first."""

from __future__ import annotations

import os
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

from flows.troubleshooting import application
from runbook.errors import RunbookFailed
from runbook.guard import containment
from runbook.guard.containment import Contained
from runbook.guard.lock import hold
from runbook.report import Report, Status
from runbook.wait import until
from tasks.application import health as users
from tests.fixtures.servers import ROLE_PASSWORD, free_port
from tests.troubleshooting.conftest import Host, cause, evidence, following

ENV = "GREETING=hello-world-4715\nDATABASE_URL=postgresql://grc_user@127.0.0.1/grc_db\n"
MAIN = """
import json
from pathlib import Path

HERE = Path(__file__).parents[1]
ENV = dict(line.split("=", 1) for line in (HERE / ".env").read_text().splitlines())
GREETING, DATABASE_URL = ENV["GREETING"], ENV["DATABASE_URL"]


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    unwell = (HERE / "unwell").exists()
    body = json.dumps({"status": "unhealthy" if unwell else "ok", "queue": "stuck" if unwell else "ok"}).encode()
    await send({"type": "http.response.start", "status": 503 if unwell else 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
"""
TELLING = 'print("told:", GREETING, ENV["API_TOKEN"].strip(), DATABASE_URL)\nraise ValueError("it ends here")\n'
LEAVING = """
import subprocess
from pathlib import Path

left = subprocess.Popen(["sleep", "600"], start_new_session=True)
(Path(__file__).parents[1] / "left").write_text(str(left.pid))
raise ValueError("it ends here")
"""
HOOKED = (
    MAIN
    + """

async def started(scope, receive, send, inner=app):
    if scope["type"] == "lifespan":
        await receive()
        (HERE / "began").touch()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    await inner(scope, receive, send)


app = started
"""
)
ALEMBIC = {
    "alembic.ini": "[alembic]\nscript_location = %(here)s/alembic\n",
    "alembic/env.py": "",
    "alembic/script.py.mako": "",
    "alembic/versions/0001_first.py": "revision = '0001'\ndown_revision = None\n",
}


@dataclass(frozen=True)
class Backend:
    """The application of a host."""

    host: Host

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.host.backend_port}"

    def write(self, main: str = MAIN, env: str = ENV) -> None:
        files = {"grc_backend/__init__.py": "", "grc_backend/main.py": main, ".env": env}
        for name, text in files.items():
            path = self.host.backend / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    def own_env(self, directory: Path, password: str = ROLE_PASSWORD) -> str:
        """The text of its own file, which the environment names now."""
        self.host.describe(directory, url=self.url, env_file=self.host.backend / ".env")
        login = f"grc_user:{quote(password, safe='')}@127.0.0.1:{self.host.server.port}"
        return f"GREETING=hello-world-4715\nAPI_TOKEN=ab.12\nDATABASE_URL=postgresql://{login}/grc_db\n"

    def start(self) -> None:
        """Returns when it answers. Its log begins with this start: nothing of other tests ended without a shutdown."""
        (self.host.root / "grc-backend.log").write_text("")
        self.host.services.start("backend")
        until(self.answers, what="the backend", seconds=120)

    def start_in_vain(self) -> None:
        """Returns when it has ended at least once."""
        log = self.host.root / "grc-backend.log"
        log.write_text("")
        self.host.services.start("backend")
        until(lambda: any(word in log.read_text() for word in ("Error", "error")), what="its failure", seconds=120)

    def answers(self) -> bool:
        try:
            return bool(httpx.get(f"{self.url}/health", trust_env=False, timeout=60).status_code)
        except httpx.HTTPError:
            return False

    def diagnosed(self) -> Report:
        """The flow's report, critical or not; nothing of it is left running. (Servers of these tests are children too;
        what they start themselves, as for a connection, may end a moment later.)"""
        before = set(psutil.Process().children())
        try:
            return application.diagnose_application.fn(environment="sick")
        except RunbookFailed as error:
            return error.report
        finally:
            assert set(psutil.Process().children()) <= before


@pytest.fixture
def backend(host: Host, tmp_path: Path) -> Iterator[Backend]:
    """Well, and not started yet."""
    made = Backend(host)
    made.write()
    host.describe(tmp_path, url=made.url)
    try:
        yield made
    finally:
        host.services.stop("backend")
        for name in (*ALEMBIC, "unwell"):
            (host.backend / name).unlink(missing_ok=True)


def test_of_a_healthy_application_nothing_is_found_and_it_is_left_alone(backend: Backend) -> None:
    backend.start()
    pid = backend.host.services.state("backend").pid
    report = backend.diagnosed()
    assert (report.status, cause(report)) == (Status.OK, "nothing found")
    assert backend.host.services.state("backend").pid == pid
    assert not [one for one in report.evidence if one.name.startswith("Foreground")]
    variables = dict(evidence(report, "Environment of backend").rows)
    assert variables["PYTHONDONTWRITEBYTECODE"] == "********"


def test_its_port_is_taken(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "ONCE_SECONDS", 0.5)
    with closing(socket.create_server(("127.0.0.1", backend.host.backend_port))):
        backend.start_in_vain()
        report = backend.diagnosed()
    assert cause(report).startswith(f"the port of backend is taken: process {os.getpid()}")


def test_a_variable_is_missing(backend: Backend) -> None:
    backend.write(env="GREETING=hello-world-4715\n")
    backend.start_in_vain()
    report = backend.diagnosed()
    assert cause(report) == "backend does not start: a variable of its environment is missing: DATABASE_URL"
    trial = evidence(report, "Foreground start").text
    assert "Traceback" in trial
    assert "KeyError: 'DATABASE_URL'" in trial


def test_an_import_fails_and_the_trial_shows_its_traceback(backend: Backend) -> None:
    backend.write(main="import interviewkit_that_is_gone\n" + MAIN)
    backend.start_in_vain()
    report = backend.diagnosed()
    assert cause(report) == "backend does not start: an import fails: No module named 'interviewkit_that_is_gone'"
    assert "Traceback" in evidence(report, "Foreground start").text
    assert "check-dependencies" in following(report)
    assert "interviewkit_that_is_gone" in evidence(report, "Log of backend").text


def test_what_a_trial_prints_is_masked(backend: Backend, tmp_path: Path) -> None:
    backend.write(main=MAIN + TELLING, env=backend.own_env(tmp_path))
    report = backend.diagnosed()
    assert cause(report) == "backend does not start: ValueError: it ends here"
    assert "told: ********" in evidence(report, "Foreground start").text
    assert "hello-world-4715" not in str(report.as_json())


def test_what_its_service_logs_is_masked_too(backend: Backend, tmp_path: Path) -> None:
    backend.write(main=MAIN + TELLING, env=backend.own_env(tmp_path))
    backend.start_in_vain()
    report = backend.diagnosed()
    assert cause(report) == "backend does not start: ValueError: it ends here"
    log = evidence(report, "Log of backend").text
    assert "told: ******** ********" in log
    for secret in ("hello-world-4715", "ab.12", ROLE_PASSWORD, quote(ROLE_PASSWORD, safe="")):
        assert secret not in str(report.as_json())


def test_a_variable_that_only_its_unit_sets_is_not_missing(backend: Backend) -> None:
    backend.write(main="import os\nos.environ['SUPERVISOR_ENABLED']\nimport interviewkit_that_is_gone\n")
    backend.start_in_vain()
    report = backend.diagnosed()
    assert "KeyError: 'SUPERVISOR_ENABLED'" in evidence(report, "Foreground start").text
    assert cause(report) == "backend does not start: an import fails: No module named 'interviewkit_that_is_gone'"


def test_a_start_leaves_no_process_behind(backend: Backend) -> None:
    backend.write(main=LEAVING)
    backend.diagnosed()
    pid = int((backend.host.backend / "left").read_text())
    until(lambda: not psutil.pid_exists(pid), what="its end", seconds=120)


@pytest.mark.parametrize("hooks", [False, True])
def test_start_up_hooks_run_only_where_the_environment_says_so(backend: Backend, tmp_path: Path, hooks: bool) -> None:
    more = 'start_variables = { UVICORN_LIFESPAN = "on" }' if hooks else ""
    backend.host.describe(tmp_path, url=backend.url, more=more)
    backend.write(main=HOOKED)
    began = backend.host.backend / "began"
    began.unlink(missing_ok=True)
    (backend.host.root / "grc-backend.log").write_text("")
    text = evidence(backend.diagnosed(), "Foreground start").text
    assert "it serves" in text
    assert (began.exists(), "without its start-up hooks" in text) == (hooks, not hooks)


def test_nothing_is_started_while_a_run_holds_the_environment(backend: Backend, tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def restore() -> None:
        with hold("sick", tmp_path / "reports", "Restore database", "recovery"):
            held.set()
            done.wait(120)

    thread = threading.Thread(target=restore)
    thread.start()
    try:
        assert held.wait(120)
        report = backend.diagnosed()
    finally:
        done.set()
        thread.join()
    _assert_not_started(report, "sick is held by “Restore database”")


def test_nothing_is_started_in_an_environment_that_is_contained(backend: Backend, tmp_path: Path) -> None:
    contained = Contained("1", 1.0, "sre", "a breach", "today", "here")
    containment.write("sick", tmp_path / "reports", contained)
    _assert_not_started(backend.diagnosed(), "contained by sre")


def _assert_not_started(report: Report, why: str) -> None:
    assert not [one for one in report.evidence if one.name.startswith("Foreground")]
    (found,) = [one for one in report.findings if one.name == "not measured: does it start in the foreground?"]
    assert why in found.value


def test_a_process_that_answers_instead_of_the_service_is_found(backend: Backend) -> None:
    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", backend.host.backend_port), Old) as orphan:
        threading.Thread(target=orphan.serve_forever, daemon=True).start()
        backend.start_in_vain()
        report = backend.diagnosed()
        orphan.shutdown()
    assert report.status is Status.WARN
    assert cause(report).startswith("backend answers, but its service is not the one that answers")
    assert f"process {os.getpid()}" in cause(report)


def test_an_error_of_a_request_is_no_reason_not_to_start(backend: Backend) -> None:
    backend.start()
    (backend.host.backend / "unwell").touch()
    with (backend.host.root / "grc-backend.log").open("a") as log:
        log.write("KeyError: 'CANDIDATE_ID'\n")
    assert cause(backend.diagnosed()).startswith("backend runs but is unhealthy: backend answers 503: queue stuck")


def test_its_own_password_is_stale(backend: Backend, tmp_path: Path) -> None:
    backend.write(env=backend.own_env(tmp_path, "stale-word-77"))
    backend.start()
    (backend.host.backend / "unwell").touch()
    report = backend.diagnosed()
    assert cause(report).startswith("PostgreSQL refuses the password of the application's own connection string")
    assert "stale-word-77" not in str(report.as_json())


def test_a_service_that_was_stopped_is_no_fault_of_the_code(backend: Backend) -> None:
    (backend.host.root / "grc-backend.log").write_text("")
    report = backend.diagnosed()
    assert "backend is stopped (grc-backend is STOPPED" in cause(report)
    assert "it serves" in evidence(report, "Foreground start").text


def test_it_runs_but_is_unhealthy(backend: Backend) -> None:
    backend.start()
    (backend.host.backend / "unwell").touch()
    report = backend.diagnosed()
    assert cause(report) == "backend runs but is unhealthy: backend answers 503: queue stuck"
    assert "summarise-errors" in following(report)


def test_a_migration_is_missing(backend: Backend) -> None:
    for name, text in ALEMBIC.items():
        path = backend.host.backend / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    backend.start()
    report = backend.diagnosed()
    assert cause(report) == "a migration is missing: the database is at none, the code needs 0001"
    assert "apply-migrations" in following(report)


def test_the_database_behind_it_is_down(backend: Backend) -> None:
    backend.start()
    (backend.host.backend / "unwell").touch()
    with backend.host.stopped("postgres"):
        report = backend.diagnosed()
    assert cause(report).startswith("the database of the application at 127.0.0.1")
    assert "diagnose-database" in following(report)


def test_a_supervisor_that_is_away_is_not_ok(backend: Backend, tmp_path: Path) -> None:
    backend.start()
    backend.host.describe(tmp_path, url=backend.url, control=free_port())
    report = backend.diagnosed()
    assert report.status is Status.WARN
    assert "could not run" in cause(report)
