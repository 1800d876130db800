"""A Prefect that answers `/health` and nothing else: a recovery from the command line runs without it, and says so."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from deployments.doctor.control import look_at_api
from flows import launch
from flows.monitoring.serve import is_there
from lab.state.environment import api_url, auth_string
from runbook.errors import OpsError
from tests.fixtures.servers import separate_prefect
from tests.stranger.system import NAME, Stranger
from tests.stranger.test_restore import GOOD, back_up

HANG_SECONDS = 900


@contextlib.contextmanager
def lost_database() -> Iterator[dict[str, str]]:
    """A real server whose SQLite file was overwritten."""
    with separate_prefect("half-dead") as control:
        for path in control.layout.home.glob("prefect.db*"):
            path.write_bytes(b"not a database" * 4096)
        yield {"PREFECT_API_URL": api_url(control.state), "PREFECT_API_AUTH_STRING": auth_string(control.state)}


@contextlib.contextmanager
def hanging_database() -> Iterator[dict[str, str]]:
    """A server that never answers what needs the database: that is locked."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith("/health"):
                ended.wait(HANG_SECONDS)
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"true")

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"PREFECT_API_URL": f"http://127.0.0.1:{server.server_port}/api"}
        ended.set()
        server.shutdown()


Fault = Callable[[], contextlib.AbstractContextManager[dict[str, str]]]


@pytest.mark.parametrize("fault", [lost_database, hanging_database], ids=["lost", "hangs"])
def test_a_recovery_runs_without_it_and_says_so(stranger: Stranger, fault: Fault) -> None:
    back_up(stranger)
    before = stranger.content()
    stranger.destroy()
    with fault() as variables:
        assert httpx.get(f"{variables['PREFECT_API_URL']}/health", trust_env=False, timeout=60).text == "true"
        with temporary_settings({PREFECT_API_URL: variables["PREFECT_API_URL"]}):
            assert not is_there(), "the watcher escalates without it"
        began = time.monotonic()
        options = ("--environment", NAME, "--confirm", NAME)
        done = stranger.python("flows.recovery.full_restore", *options, **variables)
        assert done.code == 0, done.text
        print(f"{time.monotonic() - began:.0f} s")
    assert launch.HALF_DEAD in done.text
    assert stranger.report()["status"] in GOOD
    assert stranger.report()["facts"]["lock"].startswith("keeps out runs on this host only")
    assert stranger.content() == before
    assert stranger.ready()


def test_the_doctor_names_the_lost_database() -> None:
    with lost_database() as variables:
        own = {PREFECT_API_URL: variables["PREFECT_API_URL"]}
        own[PREFECT_API_AUTH_STRING] = variables["PREFECT_API_AUTH_STRING"]
        with temporary_settings(own), pytest.raises(OpsError, match=r"answers, but its database does not \(50\d\)"):
            list(look_at_api())


def test_a_refused_login_is_an_error_of_this_shell() -> None:
    """Prefect lives and holds the locks: no recovery passes it over."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            with pytest.raises(OpsError, match="refuses the log-in of this shell"):
                launch.prefect_answers()
            assert not is_there()
        server.shutdown()
