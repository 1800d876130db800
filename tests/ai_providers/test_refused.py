"""What rehearse_fallback and update_ai_api_version refuse before they touch anything, each with what to do; and the
parts that need no lab: SDKs, shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from blocks.places import Application
from flows.ai_providers.fallback import rehearse_fallback
from flows.ai_providers.version import update_ai_api_version
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.ai.sdks import is_behind, read_sdks
from tasks.ai.shape import differences
from tests.fixtures.logfiles import NAME
from tests.fixtures.providers import KEY, providers

VERSION = "2024-10-21"


def describe(logs: Path, *lines: str, tier: str = "staging", disposable: bool = False) -> Path:
    toml, env_file = logs.parent / "trial.toml", logs.parent / ".env"
    env_file.write_text("PORT=1\nAZURE_OPENAI_API_VERSION=2024-02-01 # until then\n")
    head = f'tier = "{tier}"\ndisposable = {str(disposable).lower()}\n'
    application = f'[application]\nenv_file = "{env_file}"\npython = "{sys.executable}"\n'
    text = toml.read_text().replace("names = {}", 'names = { backend = "grc-backend" }')
    toml.write_text(head + text + application + "\n".join(["[ai_providers]", *lines, ""]))
    return env_file


def critical(flow: Any, *words: str, **parameters: str) -> Report:
    with pytest.raises(RunbookFailed) as caught:
        flow.fn(NAME, *words, **parameters)
    return caught.value.report


def test_nothing_is_taken_away_from_what_is_not_disposable_or_cannot_be_told(logs: Path) -> None:
    describe(logs, 'control = "http://127.0.0.1:9"')
    assert "is not disposable" in critical(rehearse_fallback, confirm=NAME).sentence()


def test_providers_that_cannot_be_told_to_fail_are_refused(logs: Path) -> None:
    describe(logs, disposable=True)
    assert "set [ai_providers] proxy and control" in critical(rehearse_fallback, confirm=NAME).sentence()


def test_another_server_at_the_address_is_refused(logs: Path) -> None:
    with providers() as server:
        describe(logs, f'control = "{server.url}"', disposable=True)
        assert f"the AI providers at {server.url}: 401" in critical(rehearse_fallback, confirm=NAME).sentence()


@pytest.mark.parametrize(
    ("tier", "version", "staging", "said"),
    [
        ("production", VERSION, "", "enter the staging environment in staging"),
        ("production", VERSION, NAME, "enter another environment in staging"),
        ("staging", "2024-10", "", "“2024-10” is no API version"),
        ("staging", VERSION, "", "has no azure_endpoint, azure_deployments, azure_key"),
        ("staging", VERSION, "elsewhere", "there is no environment “elsewhere”"),
    ],
    ids=["no staging", "production as staging", "no version", "not described", "no such environment"],
)
def test_an_update_that_cannot_be_tried_is_refused(
    logs: Path, tier: str, version: str, staging: str, said: str
) -> None:
    env_file = describe(logs, tier=tier)
    before = env_file.read_text()
    assert said in critical(update_ai_api_version, version, staging=staging, confirm=NAME).sentence()
    assert env_file.read_text() == before


def test_a_plan_shows_what_is_tried_and_changes_nothing(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_TEST_AZURE_KEY", KEY)
    with providers() as server:
        described = (f'azure_endpoint = "{server.url}"', 'azure_key_env = "OPS_TEST_AZURE_KEY"', "slow_seconds = 300")
        env_file = describe(logs, *described, 'azure_deployments = ["gpt-4o", "mini"]', "timeout_seconds = 300")
        before = env_file.read_text()
        server.shapes[VERSION] = {"object": 1}
        report = update_ai_api_version.fn(NAME, VERSION)
    assert report.status is Status.PLANNED, report.sentence()
    assert [step.detail for step in report.plan_steps] == [
        f"AZURE_OPENAI_API_VERSION: 2024-02-01 → {VERSION}",
        "backend",
    ]
    found = {finding.name: finding.value for finding in report.findings if finding.status is Status.WARN}
    assert found["fields removed or with another type"] == "object"
    assert env_file.read_text() == before


def test_sdks_that_are_behind_or_missing_or_cannot_be_asked_are_told(tmp_path: Path) -> None:
    found = read_sdks.work(Application(python=sys.executable), ["boto3", "no-such-package"])
    assert (bool(found["boto3"]), found["no-such-package"]) == (True, "")
    assert [is_behind("1.9.2", "1.10"), is_behind("1.10", "1.10.0"), is_behind("2.0rc1", "1.5")] == [True, False, False]
    assert is_behind("unknown", "1.0") is None
    python = tmp_path / "python"
    for program, said in (("echo hello", "does not print the versions"), ("exit 1", "exited 1")):
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
        with pytest.raises(OpsError, match=said):
            read_sdks.work(Application(python=str(python)), ["boto3"])
    with pytest.raises(OpsError, match="there is no program"):
        read_sdks.work(Application(python=str(tmp_path / "none")), ["boto3"])


def test_differences_of_shapes_are_by_field_and_type() -> None:
    before = {"a": [{"b": 1}, {"b": "x"}], "c": None, "d": {"e": True}}
    after = {"a": [{"b": 1}], "c": None, "d": {"f": True}}
    assert differences(before, after) == [("a[].b", "int or str", "int"), ("d.e", "bool", ""), ("d.f", "", "bool")]
