"""run_performance_test: Locust on the lab's real application, and everything that Locust may do instead."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.config import toml
from blocks.environment import Environment
from blocks.postgres.server import execute
from flows.recovery.drills.drill import run_drill
from flows.routine import load
from flows.routine.load import run_performance_test
from lab.client import Lab
from runbook import metrics
from runbook.errors import OpsError
from runbook.report import Report, Status
from tasks.load import driving, results
from tasks.reports.past import last
from tests.fixtures.application.broken import broken, nobody_left, reported
from tests.fixtures.application.checkouts import program
from tests.routine.checklist.waiting import TOML

LOG_IN, CREATE, ASK, READ = NAMES = ("ログイン", "面接セッション作成", "AI応答", "データ読み取り")
LOAD = {"users": 4, "spawn_rate": 4, "seconds": 6, "ai_answers": 1000}


@pytest.fixture
def environment(lab: Lab, tmp_path: Path) -> Iterator[Environment]:
    """The lab's, its reports in the test's own directory."""
    whole = toml.environment(lab.name)
    with whole.derived({}, reports=tmp_path / "reports").stands_in():
        yield Environment.find(lab.name)


def findings(report: Report) -> dict[str, Status]:
    return {one.name: one.status for one in report.findings}


def value(report: Report, name: str) -> str:
    (found,) = [one.value for one in report.findings if one.name == name]
    return found


def rows(report: Report, name: str) -> dict[str, tuple[str, ...]]:
    return {row[0]: row for item in report.evidence if item.name == name for row in item.rows}


def sessions(env: Environment) -> int:
    with env.postgres.connect(env.postgres.database) as connection:
        where = "position = '負荷試験 (interview-ops)'"
        return int(execute(connection, f"SELECT count(*) FROM interview_sessions WHERE {where}")[0][0])


@pytest.fixture
def without_ai(environment: Environment) -> Iterator[None]:
    """No provider answers."""

    def tell(failing: bool) -> None:
        for name in ("azure", "bedrock", "vertex"):
            address = f"{environment.ai_providers.control}/control/{name}"
            httpx.post(address, json={"failing": failing}, trust_env=False, timeout=120).raise_for_status()

    tell(True)
    try:
        yield
    finally:
        tell(False)


def test_a_load_is_measured_and_an_ai_that_fails_is_found(
    environment: Environment, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = sessions(environment)
    # Asked for an environment that names the lab as the one to drill in.
    path = tmp_path / "production.toml"
    path.write_text(TOML.format(name="acme", directory=tmp_path, more=f'drill_environment = "{environment.name}"'))
    with monkeypatch.context() as patch:
        patch.setenv("OPS_ENVIRONMENT", "acme")
        patch.setenv("OPS_ENVIRONMENT_FILE", str(path))
        report = reported(lambda: run_performance_test.fn("acme", **LOAD))
    assert report.environment == environment.name
    assert report.status is not Status.CRITICAL, report.sentence()
    measured = rows(report, "Endpoints")
    assert set(NAMES) < set(measured)
    assert all(int(measured[name][2]) == 0 for name in (*NAMES, "all requests")), "not one failed"
    assert all(0 < float(row[4]) <= float(row[5]) <= float(row[6]) <= float(row[7]) for row in measured.values())
    assert sessions(environment) - before >= int(measured[CREATE][1]) >= LOAD["users"], "they really were created"
    assert int(measured[LOG_IN][1]) >= LOAD["users"]
    saturation = rows(report, "Saturation during the test")
    assert {"host.cpu.used_ratio", "postgres.connections.used_ratio", "redis.memory.used_ratio"} < set(saturation)
    assert sum(bool(item.svg) for item in report.evidence) >= 2
    directory = Path(report.facts["evidence"])
    assert READ in (directory / driving.TABLE).read_text(encoding="utf-8-sig")
    assert {"load_stats.csv", "load_stats_history.csv", "load.json"} <= {path.name for path in directory.iterdir()}
    password = environment.application.password.get_secret_value()
    written = [path.read_text(errors="replace") for path in (tmp_path / "reports").rglob("*") if path.is_file()]
    assert not any(password in text for text in written)

    request.getfixturevalue("without_ai")
    strict = {metrics.API_RESPONSE.name: (0.0001, 5.0)}
    monkeypatch.setattr("blocks.environment.default_limits", lambda rpo: metrics.default_limits(rpo) | strict)
    monkeypatch.setattr(load, "SLOWER", 0.0)
    monkeypatch.setattr(load, "SLOWER_SECONDS", -60.0)
    report = reported(lambda: run_performance_test.fn(environment.name, **LOAD))
    assert report.status is Status.CRITICAL
    found = findings(report)
    assert found[f"{ASK}: errors"] is Status.CRITICAL
    assert found[f"{READ}: errors"] is Status.OK
    assert value(report, f"{ASK}: errors").startswith("100.0%")
    assert any(ASK in row and "503" in row[1] for row in rows(report, FAILED).values())
    assert found[f"{READ}: response time"] is Status.WARN
    assert found["as fast as the last test"] is Status.WARN
    assert READ in value(report, "as fast as the last test")
    assert "compared with" in report.facts
    assert last(tmp_path / "reports", environment.name, "run-performance-test") is not None


FAILED = "Failed requests (they may lack the last second)"


@pytest.mark.parametrize("mode", ["missing", "absent", "fails", "hangs", "garbage", "silent", "killed"])
def test_a_locust_that_is_not_well_is_told(
    environment: Environment, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "locust"
    match mode:
        case "missing":
            command, said = [sys.executable, "-m", "locust_of_nobody"], "locust is not installed"
        case "killed":
            program(path, "kill -9 $$")
            command, said = [str(path)], f"ended by signal {int(signal.SIGKILL)}"
        case "absent":
            command, said = [str(path)], "there is no program"
        case "garbage":
            program(path, 'echo "[{" >load.json')
            command, said = [str(path)], "cannot be read"
        case _:
            broken(path, mode)  # type: ignore[arg-type]
            command = [str(path)]
            said = {"fails": "exited 1", "hangs": "did not end", "silent": "left no results"}[mode]
    monkeypatch.setattr(driving, "LOCUST", command)
    monkeypatch.setattr(driving, "GRACE_SECONDS", -6.0)
    monkeypatch.setattr(driving, "STOP_SECONDS", 1)
    report = reported(lambda: run_performance_test.fn(environment.name, seconds=5 if mode == "hangs" else 60))
    assert report.status is Status.CRITICAL
    told = [one for one in report.findings if said in one.name]
    assert told, report.sentence()
    assert told[0].hint
    nobody_left(path)


@pytest.mark.parametrize(
    ("flow", "parameters", "key"),
    [
        (run_performance_test, {}, "[[application.load_test]]"),
        (run_drill, {"scenario": "full_restore"}, "[[application.writes.steps]]"),
        (run_drill, {"scenario": "data_corruption", "confirm": "it"}, "[[application.writes.steps]]"),
    ],
)
def test_what_the_environment_does_not_describe_is_refused_in_the_plan(
    small: str, flow: Any, parameters: dict[str, str], key: str
) -> None:
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text("disposable = true\n" + path.read_text())
    report = reported(lambda: flow.fn(small, **parameters))
    assert report.status is Status.CRITICAL
    assert f"{key} is not configured" in report.sentence()
    assert "docs/application.md" in report.sentence()


def test_an_environment_that_is_needed_gets_no_load(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = reported(lambda: run_performance_test.fn(small))
    assert "is not disposable: it gets no load" in report.findings[0].name
    assert "drill_environment" in report.findings[0].hint
    path = Path(os.environ["OPS_ENVIRONMENT_FILE"])
    path.write_text(path.read_text().replace("[objectives]", 'drill_environment = "nowhere"\n[objectives]', 1))
    report = reported(lambda: run_performance_test.fn(small))
    assert report.status is Status.CRITICAL
    assert "nowhere" in report.findings[0].name
    with Environment.find(small).model_copy(update={"name": "nowhere"}).stands_in():
        report = reported(lambda: run_performance_test.fn(small))
    assert f"the drill_environment of {small}, is not disposable" in report.findings[0].name
    # A copied TOML, in which somebody changed the name and `disposable` only: its servers are the first one's.
    path.write_text(path.read_text() + '[application]\nurl = "http://127.0.0.1:9"\n')
    copied = Environment.find(small).model_copy(update={"name": "nowhere", "disposable": True})
    with copied.stands_in():
        report = reported(lambda: run_performance_test.fn(small))
    assert report.environment == small
    assert "both use the application at http://127.0.0.1:9" in report.findings[0].name


def test_percentiles_are_of_every_request(tmp_path: Path) -> None:
    one = {
        "name": "a",
        "num_failures": 1,
        "response_times": {"10": 90, "200": 9, "3000": 1},
        "start_time": 100.0,
        "last_request_timestamp": 110.0,
    }
    (tmp_path / results.STATS).write_text(json.dumps([one]))
    found = results.read_results(tmp_path)
    (endpoint,) = found.endpoints
    assert (endpoint.p50, endpoint.p95, endpoint.p99, endpoint.longest) == (0.01, 0.2, 0.2, 3.0)
    assert (endpoint.requests, endpoint.error_ratio, endpoint.per_second) == (100, 0.01, 10.0)
    (tmp_path / results.STATS).write_text("[]")
    with pytest.raises(OpsError, match="not one request"):
        results.read_results(tmp_path)
