"""check_ai_providers against real HTTP: what is well, each way in which a provider fails, and what retires."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from google.auth.compute_engine import _metadata

from flows.ai_providers.check import check_ai_providers
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from tests.fixtures.logfiles import NAME
from tests.fixtures.providers import KEY, MODEL, SECRET, TOKEN, ProviderServer, providers

VERSION = "2024-10-21"
GPT, PROFILE, GEMINI = "azure gpt-4o", f"bedrock jp.{MODEL}", "vertex gemini-2.5-pro"
TOML = """
[application]
env_file = "{base}/.env"
[ai_providers]
timeout_seconds = {seconds}
slow_seconds = 300
retirements = "{base}/retirements.toml"
azure_endpoint = "{url}"
azure_key_env = "OPS_TEST_AZURE_KEY"
azure_deployments = ["gpt-4o"]
bedrock_region = "ap-northeast-1"
bedrock_models = ["jp.{model}"]
bedrock_access_key = "ops"
bedrock_secret_key_env = "OPS_TEST_BEDROCK_KEY"
bedrock_endpoint = "{url}"
bedrock_runtime_endpoint = "{url}"
vertex_project = "grc"
vertex_models = ["gemini-2.5-pro"]
vertex_endpoint = "{url}"
vertex_token_variable = "OPS_TEST_VERTEX_TOKEN"
"""
DATES = """
[azure-api]
source = "https://example.com/versions"
looked_at = {looked_at}
[azure-api.retires]
"{version}" = {version_ends}
[vertex]
source = "https://example.com/models"
looked_at = {looked_at}
[vertex.retires]
"gemini-2.5-pro" = {model_ends}
"""


def today() -> date:
    """Queried when a test runs: it may be another day than when the tests were collected."""
    return datetime.now(UTC).date()


class Place:
    """The environment NAME, whose providers are a server of this module."""

    def __init__(self, base: Path, url: str) -> None:
        self.base, self.toml, self.url = base, base / "trial.toml", url
        self._before = self.toml.read_text()
        (base / ".env").write_text(f'PORT=1\nAZURE_OPENAI_API_VERSION="{VERSION}"\n')
        self.describe()
        self.dates()

    def describe(self, url: str = "", seconds: float = 300, **changed: str) -> None:
        """[ai_providers]; a key in `changed` gets that text, or goes where it is empty."""
        text = TOML.format(base=self.base, url=url or self.url, seconds=seconds, model=MODEL)
        lines = [line for line in text.splitlines() if line.partition(" = ")[0] not in changed]
        lines += [f"{key} = {value}" for key, value in changed.items() if value]
        self.toml.write_text(self._before + "\n".join(lines) + "\n")

    def dates(
        self, looked_days: int = 1, version_days: int = 400, model_days: int = 400, version: str = VERSION
    ) -> None:
        """The table of retirement dates, relative to today."""
        text = DATES.format(
            looked_at=today() - timedelta(days=looked_days),
            version=version,
            version_ends=today() + timedelta(days=version_days),
            model_ends=today() + timedelta(days=model_days),
        )
        (self.base / "retirements.toml").write_text(text)


@pytest.fixture(scope="module")
def _server() -> Iterator[ProviderServer]:
    with providers() as found:
        yield found


@pytest.fixture
def server(_server: ProviderServer) -> ProviderServer:
    _server.reset()
    _server.deprecated["gpt-4o-2024-08-06"] = today() + timedelta(days=400)
    return _server


@pytest.fixture
def place(logs: Path, server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in (("AZURE_KEY", KEY), ("BEDROCK_KEY", SECRET), ("VERTEX_TOKEN", TOKEN)):
        monkeypatch.setenv(f"OPS_TEST_{name}", value)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Place(logs.parent, server.url)


def check() -> Report:
    try:
        report = check_ai_providers.fn(NAME)
    except RunbookFailed as error:
        report = error.report
    said = str(report.as_json())
    assert not [secret for secret in (KEY, SECRET, TOKEN) if secret in said]
    return report


def bad(report: Report) -> dict[str, tuple[Status, str]]:
    return {found.name: (found.status, found.value) for found in report.findings if found.status is not Status.OK}


def hint(report: Report, name: str) -> str:
    return next(found.hint for found in report.findings if found.name == name)


def test_all_that_is_well_is_ok(place: Place, server: ProviderServer) -> None:
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert report.outcome == "3 of 3 deployments and models answer"
    assert report.facts["Azure API version"] == VERSION
    (canaries,) = [item for item in report.evidence if item.name == "Canaries"]
    assert [(*row[:4], row[5]) for row in canaries.rows] == [
        ("azure", "gpt-4o", "yes", "gpt-4o-2024-08-06", "24"),
        ("bedrock", f"jp.{MODEL}", "yes", f"jp.{MODEL}", "24"),
        ("vertex", "gemini-2.5-pro", "yes", "gemini-2.5-pro", "24"),
    ]
    assert ("POST", f"/openai/deployments/gpt-4o/chat/completions?api-version={VERSION}") in server.asked
    server.reasoning = True
    place.describe(azure_api_version='"v1"')
    place.dates(version="v1")
    report = check()
    assert report.status is Status.OK, report.sentence()
    assert ("POST", "/openai/v1/chat/completions") in server.asked


FAULTS = [
    ("401", Status.CRITICAL, "401 ", "renew the key"),
    ("403", Status.CRITICAL, "403 ", "renew the key"),
    ("404", Status.CRITICAL, "404 ", "no such deployment"),
    ("429", Status.WARN, "429 ", "quota"),
    ("500", Status.CRITICAL, "500 ", "status page"),
    ("garbage", Status.CRITICAL, "", ""),
    ("array", Status.CRITICAL, "", ""),
    ("shape", Status.CRITICAL, "its answer has other fields: ", "update-ai-api-version"),
]


@pytest.mark.parametrize(("fault", "status", "said", "hinted"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_a_finding_of_that_provider_alone(
    place: Place, server: ProviderServer, fault: str, status: Status, said: str, hinted: str
) -> None:
    for provider, name in (("azure", GPT), ("bedrock", PROFILE), ("vertex", GEMINI)):
        with server.fault(provider, fault):  # type: ignore[arg-type]
            report = check()
        found = bad(report)
        assert [key for key in found if key.endswith("answers")] == [f"{name} answers"]
        assert found[f"{name} answers"][0] is status
        assert found[f"{name} answers"][1].startswith(said)
        assert hinted in hint(report, f"{name} answers")
        assert report.outcome.startswith("2 of 3")


def test_what_hangs_or_drips_ends_with_the_configured_time(place: Place, server: ProviderServer) -> None:
    place.describe(seconds=0.5)
    for provider, name in (("azure", GPT), ("bedrock", PROFILE), ("vertex", GEMINI)):
        with server.fault(provider, "hang"):
            found = bad(check())
        assert found[f"{name} answers"][0] is Status.CRITICAL
        assert found[f"{name} answers"][1].startswith("no answer within 0.5 s")
    with server.fault("azure", "drip"):
        found = bad(check())
    assert "within 0.5 s" in found[f"{GPT} answers"][1]  # of the whole answer, or of a piece on a busy machine


def test_nobody_there_an_answer_that_is_too_long_and_a_wrong_key(
    place: Place, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.fault("vertex", "many tokens"):
        assert bad(check()) == {f"tokens of {GEMINI}": (Status.WARN, "5000")}
    place.describe(slow_seconds="0.0000001")
    assert set(bad(check())) == {f"latency of {name}" for name in (GPT, PROFILE, GEMINI)}
    monkeypatch.setenv("OPS_TEST_AZURE_KEY", wrong := "another-key-4714")
    place.describe()
    report = check()
    assert "401 Unauthorized: 401 the key ******** is not known" in bad(report)[f"{GPT} answers"][1]
    assert wrong not in str(report.as_json())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place.describe(url=f"http://127.0.0.1:{closed.getsockname()[1]}")
        found = bad(check())
    for name in (GPT, PROFILE, GEMINI):
        assert found[f"{name} answers"][0] is Status.CRITICAL
    for name in ("azure: deprecation of its models", "bedrock: lifecycle of its models", "vertex: grc in us-central1"):
        assert "not known: " in found[name][1]


def test_legacy_and_retirement_are_told_by_date_and_source(place: Place, server: ProviderServer) -> None:
    server.lifecycle[MODEL], server.ends[MODEL] = "LEGACY", today() + timedelta(days=80)
    server.deprecated["gpt-4o-2024-08-06"] = today() + timedelta(days=30)
    place.dates(version_days=-1, model_days=89, looked_days=91)
    found = bad(check())
    version = found[f"retirement of azure API version {VERSION}"]
    assert (version[0], version[1].startswith("retired on")) == (Status.CRITICAL, True)
    assert found["retirement of azure gpt-4o (gpt-4o-2024-08-06)"][0] is Status.WARN
    assert found[f"lifecycle of {PROFILE}"] == (Status.WARN, "LEGACY")
    assert found[f"retirement of {PROFILE}"][1].endswith("by the service")
    assert found[f"retirement of {GEMINI}"][1].endswith("https://example.com/models")
    assert {"retirement dates of azure-api", "retirement dates of vertex"} <= set(found)
    server.lifecycle.clear()
    assert bad(check())[f"{PROFILE} is listed"][0] is Status.WARN


def test_what_is_not_known_is_never_ok(place: Place, server: ProviderServer) -> None:
    place.dates(version="2024-02-01")
    assert bad(check()) == {f"retirement of azure API version {VERSION}": (Status.WARN, "not known")}
    (place.base / "retirements.toml").write_text("[vertex]\nsource = 1\n")
    assert "cannot be read: KeyError" in bad(check())["the table of retirement dates"][1]
    (place.base / ".env").write_text("PORT=1\n")
    found = bad(check())
    assert "has no line AZURE_OPENAI_API_VERSION=…" in found["azure: the API version in use"][1]
    assert found["azure: the API version in use"][0] is Status.CRITICAL


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("", "there is no program gcloud"),
        ("exit 3", "gcloud exited 3"),
        ("echo two words", "no valid token"),
        ("exec sleep 1000", "did not end within"),
    ],
    ids=["missing", "fails", "garbage", "hangs"],
)
def test_gcloud_is_asked_for_a_token_and_each_way_without_one_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    place.describe(
        vertex_token_variable="",
        azure_deployments="[]",
        bedrock_models="[]",
        chain='["vertex"]',
        timeout_seconds="0.5" if "sleep" in program else "300",
    )
    programs = place.base / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(programs))
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", True)
    if program:
        (programs / "gcloud").write_text(f"#!/bin/sh\n{program}\n")
        (programs / "gcloud").chmod(0o755)
    report = check()
    assert said in bad(report)["vertex: an access token"][1]
    assert "gcloud auth application-default login" in hint(report, "vertex: an access token")
    (programs / "gcloud").write_text(f"#!/bin/sh\necho {TOKEN}\n")
    (programs / "gcloud").chmod(0o755)
    place.describe(vertex_token_variable="", azure_deployments="[]", bedrock_models="[]", chain='["vertex"]')
    assert f"{GEMINI} answers" not in bad(check())


def test_a_provider_of_the_chain_without_a_description_is_told(place: Place) -> None:
    place.describe(bedrock_models="[]", azure_endpoint="")
    found = bad(check())
    assert set(found) == {"bedrock is checked", "azure is checked"}
    place.toml.write_text(place.toml.read_text().partition("[ai_providers]")[0])
    assert "names no ai_providers" in check().sentence()
