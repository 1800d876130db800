"""rehearse_fallback and update_ai_api_version on the lab's own application: providers really go and come back, the
backend is really restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.config import toml
from blocks.environment import Environment
from flows.ai_providers import fallback
from flows.ai_providers.fallback import rehearse_fallback
from flows.ai_providers.version import VersionMarker, update_ai_api_version
from lab.client import Lab
from runbook.errors import OpsError, RunbookFailed
from runbook.files.chain import reports_in
from runbook.report import Report, Status
from tasks.ai.interview import ask_application, begin_interview
from tasks.application.env_file import read_variable
from tasks.application.health import wait_healthy
from tasks.faults.providers import read_provider_states
from tasks.host.services import start_services, stop_services
from tests.fixtures import forked
from tests.fixtures.providers import KEY, ProviderServer, providers
from tests.fixtures.servers import free_port

ROOT = Path(__file__).parents[2]
OLD, NEW = "2024-02-15-preview", "2024-10-21"
WELL = {"azure": "ok", "bedrock": "ok", "vertex": "ok"}
VARIABLE = "AZURE_OPENAI_API_VERSION"
DATES = '[azure-api]\nsource = "https://example.com"\nlooked_at = {today}\n[azure-api.retires]\n"{new}" = {later}\n'


def finding(report: Report, name: str) -> tuple[Status, str]:
    (found,) = [found for found in report.findings if found.name == name]
    return found.status, found.value


def rows(report: Report, name: str) -> list[tuple[str, ...]]:
    return next(list(item.rows) for item in report.evidence if item.name.startswith(name))


def answers_by(env: Environment) -> str:
    return ask_application(begin_interview(env.application)).provider


def restart(env: Environment) -> None:
    stop_services(env.services, ["backend"])
    start_services(env.services, ["backend"])
    wait_healthy(env.application, seconds=300)


KILLED = """
import sys
from flows.ai_providers.fallback import rehearse_fallback
rehearse_fallback.fn(sys.argv[1], confirm=sys.argv[1])
"""
CANCELLED = f"""
import signal
from prefect.exceptions import TerminationSignal

def end(number, frame):
    raise TerminationSignal(number)

signal.signal(signal.SIGTERM, end)
{KILLED}"""


def test_the_next_provider_answers_and_without_any_the_user_is_refused_also_after_a_killed_run(lab: Lab) -> None:
    env = toml.environment(lab.name)
    half_done = env.reports_directory / fallback.RehearsalMarker.FILE
    plan = rehearse_fallback.fn(lab.name)
    assert (plan.status, read_provider_states(env)) == (Status.PLANNED, WELL)
    steps = ["begin an interview", *["break"] * len(WELL), "end the faults"]
    assert [one.step for one in plan.plan_steps] == steps

    report = rehearse_fallback(lab.name, confirm=lab.name)  # as a flow run
    assert report.status is Status.OK, report.sentence()
    assert [row[:3] for row in rows(report, "Replies to the user")] == [
        ("none", "azure gpt-4o", "201"),
        ("azure", "bedrock anthropic.claude-3-5-sonnet", "201"),
        ("azure, bedrock", "vertex gemini-1.5-pro", "201"),
        ("azure, bedrock, vertex", "none: AI providers unavailable", "503"),
        ("none again", "azure gpt-4o", "201"),
    ]
    assert read_provider_states(env) == WELL
    assert not half_done.exists()

    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OPS_FAILPOINT": "after read_stored"}
    done = forked.run(["-c", KILLED, lab.name], variables)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert set(read_provider_states(env).values()) == {"failing"}
    plan = rehearse_fallback.fn(lab.name)
    assert "failing: azure, bedrock, vertex" in finding(plan, "interrupted rehearsal")[1]
    assert [one.step for one in plan.plan_steps] == ["end the faults", *steps]
    assert set(read_provider_states(env).values()) == {"failing"}, "a plan changes nothing"
    report = rehearse_fallback.fn(lab.name, confirm=lab.name)
    assert report.status is Status.WARN, report.sentence()
    assert (read_provider_states(env), half_done.exists(), answers_by(env)) == (WELL, False, "azure")

    done = forked.run(["-c", CANCELLED, lab.name], {**variables, "OPS_FAILPOINT": "after read_stored:cancel"})
    assert done.returncode, done.stdout
    assert (read_provider_states(env), half_done.exists()) == (WELL, False)
    newest = json.loads(reports_in(env.reports_directory)[-1].read_text())
    ended = {one["name"]: one["value"] for one in newest["findings"]}
    assert ended["state of the system"] == "the faults are ended"

    # A bug: what the first provider fails with is what the user gets.
    source = Path(env.application.backend_directory) / "grc_backend" / "ai.py"
    sound = source.read_text()
    broken = sound.replace("                continue\n", "                raise\n")
    assert broken != sound
    try:
        source.write_text(broken)
        restart(env)
        with pytest.raises(RunbookFailed) as caught:
            rehearse_fallback.fn(lab.name, confirm=lab.name)
    finally:
        source.write_text(sound)
        restart(env)
    status, value = finding(caught.value.report, "without azure the user gets an answer")
    assert (status, value.startswith("500 ")) == (Status.CRITICAL, True)
    status, _ = finding(caught.value.report, "without any provider the user gets a clear refusal")
    assert status is Status.CRITICAL
    assert (read_provider_states(env), half_done.exists()) == (WELL, False)


def test_through_the_proxy_each_kind_of_fault_is_rehearsed_and_an_application_beside_it_is_found(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, fakes = toml.file_of(lab.name).read_text(), toml.environment(lab.name).ai_providers.control
    at = {name: f"127.0.0.1:{free_port()}" for name in WELL}
    own = "".join(f'{key} = "{fakes}"\n' for key in ("azure_endpoint", "bedrock_runtime_endpoint", "vertex_endpoint"))
    own += f'control = "http://127.0.0.1:{free_port()}"\n[ai_providers.proxy]\n'
    own += "".join(f'{name} = "{address}"\n' for name, address in at.items())
    before = text[: text.index("[ai_providers]")]
    rest = text[text.index("[alerts]") :]
    (tmp_path / "lab.toml").write_text(f"{before}[ai_providers]\n{own}\n{rest}")
    (tmp_path / "none.toml").write_text(f"{before}[ai_providers]\n\n{rest}")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "none.toml"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunbookFailed, match="cannot be rehearsed here.*run python -m tasks.ai.proxy"):
        rehearse_fallback.fn(lab.name)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "lab.toml"))
    env = toml.environment(lab.name)
    env_file = Path(env.application.env_file)
    was = env_file.read_text()
    argv = [sys.executable, "-m", "tasks.ai.proxy", "--environment", lab.name]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout
            assert proxy.stdout.readline().startswith("listening: azure 127.0.0.1:")
            with pytest.raises(RunbookFailed, match="the application uses the proxy: 0 requests for azure"):
                rehearse_fallback.fn(lab.name, confirm=lab.name)
            assert read_provider_states(env) == WELL
            env_file.write_text(was + "".join(f"{name.upper()}_BASE_URL=http://{at[name]}\n" for name in at))
            restart(env)
            for fault in ("refused", "429"):
                report = rehearse_fallback.fn(lab.name, fault=fault, confirm=lab.name)
                assert report.status is Status.OK, report.sentence()
                answers = [row[1].split()[0] for row in rows(report, "Replies to the user")]
                assert answers == ["azure", "bedrock", "vertex", "none:", "azure"]
                assert read_provider_states(env) == WELL
        finally:
            env_file.write_text(was)
            restart(env)
            proxy.send_signal(signal.SIGTERM)
    assert proxy.returncode == 0


@pytest.fixture
def azure(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProviderServer]:
    """The lab's environment with Azure's protocol for its deployment, and the version in its .env."""
    before, env_file = toml.file_of(lab.name).read_text(), Path(toml.environment(lab.name).application.env_file)
    was = env_file.read_text()
    today = datetime.now(UTC).date()
    dates = DATES.format(today=today, new=NEW, later=today + timedelta(days=400))
    (tmp_path / "dates.toml").write_text(dates)
    monkeypatch.setenv("OPS_TEST_AZURE_KEY", KEY)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "lab.toml"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with providers() as server:
        described = f'azure_endpoint = "{server.url}"\nazure_key_env = "OPS_TEST_AZURE_KEY"\n'
        described += f'azure_deployments = ["gpt-4o"]\nretirements = "{tmp_path}/dates.toml"\n'
        described += 'sdks = { "boto3" = "1.0", "openai" = "1.0" }\n'
        (tmp_path / "lab.toml").write_text(before.replace("[ai_providers]\n", f"[ai_providers]\n{described}"))
        env_file.write_text(f"{was}{VARIABLE}='{OLD}'\n")
        yield server
    env_file.write_text(was)


def test_a_version_is_tried_switched_returned_from_and_undone(
    lab: Lab, azure: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = toml.environment(lab.name)
    env_file = Path(env.application.env_file)
    others = env_file.read_text().rpartition(VARIABLE)[0]

    def pid() -> int:
        return env.services.state("backend").pid

    def update(version: str, **parameters: Any) -> Report:
        return update_ai_api_version.fn(lab.name, version, **{"confirm": lab.name, **parameters})

    running = pid()
    azure.shapes[NEW] = {
        "usage": {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24, "details": {"n": 1}}
    }
    plan = update(NEW, confirm="")
    assert plan.status is Status.PLANNED, plan.sentence()
    assert rows(plan, "Fields of the answers") == [("gpt-4o", "usage.details.n", "missing", "int")]
    assert "openai is not installed (needed: 1.0)" in finding(plan, "SDKs of the application")[1]
    assert ("openai", "not installed", "1.0") in rows(plan, "SDKs")

    azure.shapes[NEW] = {"choices": [{"message": {"text": "OK"}, "finish_reason": "stop"}]}
    with pytest.raises(RunbookFailed, match=r"choices\.0\.message\.content is missing"):
        update(NEW)
    azure.shapes.clear()
    azure.refused_versions = {NEW}
    with pytest.raises(RunbookFailed, match=f"gpt-4o answers on {NEW}: 404"):
        update(NEW)
    with pytest.raises(OpsError, match="“latest” is no API version"):
        update("latest")
    azure.refused_versions = {OLD}
    assert pid() == running, "nothing was restarted"

    report = update(NEW)
    assert report.status is Status.WARN, report.sentence()  # the SDK, and the old one that does not answer
    assert finding(report, f"the application is healthy with {NEW}")[0] is Status.OK
    assert env_file.read_text() == f"{others}{VARIABLE}='{NEW}'\n"
    assert report.facts["undo"] == f"update-ai-api-version with version={OLD}"
    assert pid() not in (0, running)
    azure.refused_versions = set()
    running = pid()
    assert update(NEW).outcome.endswith("nothing to switch")
    assert pid() == running

    # Healthy, but answered by the next provider: returned from, and the next launch ends what that left open.
    httpx.post(f"{env.ai_providers.control}/control/azure", json={"failing": True}, timeout=120).raise_for_status()
    with pytest.raises(RunbookFailed, match=f"also unhealthy with the old version {NEW}: .*fell back from azure"):
        update(OLD)
    assert read_variable(env.application, VARIABLE, "") == NEW
    httpx.post(f"{env.ai_providers.control}/control/azure", json={"failing": False}, timeout=120).raise_for_status()
    report = update(OLD)
    assert finding(report, "interrupted switch")[0] is Status.WARN
    assert read_variable(env.application, VARIABLE, "") == OLD
    assert not (env.reports_directory / VersionMarker.FILE).exists()

    # A value that the backend does not start with: the one before is put back.
    text = toml.file_of(lab.name).read_text()
    toml.file_of(lab.name).write_text(
        text.replace("[ai_providers]\n", '[ai_providers]\nazure_version_variable = "AI_RATE_LIMIT"\n')
    )
    with pytest.raises(RunbookFailed, match="rolled back to 100000, with which it is healthy") as caught:
        update(NEW, health_seconds=5)
    assert "undo" not in caught.value.report.facts
    assert caught.value.report.outcome == "the application uses 100000 (before: 100000)"
    assert read_variable(env.application, "AI_RATE_LIMIT", "") == "100000"
    assert not (env.reports_directory / VersionMarker.FILE).exists()
    assert answers_by(env) == "azure"
