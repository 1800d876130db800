"""start-here: each symptom leads to a runbook's form that is filled in, and the page shows what failed and what runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml  # type: ignore[import-untyped]
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from deployments import entries, register, start_page
from deployments.maintenance import NAME as PLACEHOLDER
from deployments.runbooks import shown
from flows.logs.audit import search_audit_log
from flows.troubleshooting import symptoms
from flows.troubleshooting.start_here import start_here
from flows.troubleshooting.symptoms import read_symptoms
from runbook.errors import RunbookFailed
from runbook.guard.lock import hold
from runbook.language.say import Language
from runbook.report import Report, Status
from tasks.recovery_points import standing
from tasks.recovery_points.standing import Recoverable, RecoveryStanding

NAME = "start-trial"
UI = "http://ui.example/v2"
TOML = """
name = "{name}"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[logs]
audit = "{base}/audit.log"
"""
# What an operator types at night → the runbook whose form has to open.
SEARCHES = {
    "slow": "diagnose-database",
    "yesterday": "restore-to-point",
    "login": "search-audit-log",
    "admin": "search-audit-log",
    "gone": "full-restore",
    "certificate": "check-certificates",
    "memory": "check-redis-memory",
    "遅い": "diagnose-database",
    "昨日": "restore-to-point",
    "証明書": "check-certificates",
    "消えた": "full-restore",
    "満杯": "check-redis-memory",
    "ログイン": "search-audit-log",
}


def test_the_table_has_every_diagnosis_every_chapter_of_recovery_and_words_that_people_search() -> None:
    found, names = read_symptoms(), [one.name_in(NAME, "en") for one in read_symptoms()]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.search(r"[/%&<>]", name)], "Prefect refuses these in a name"
    runbooks = {runbook.flow for one in found for runbook in one.runbooks}
    content = yaml.safe_load(Path("prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    tags = {start_page.flow_in(entry): entry["tags"][0] for entry in content}
    assert {f for f, section in tags.items() if section == "付録A"} - {"start-here"} <= runbooks
    assert {"§8.1", "§8.2", "§8.3", "§8.4", "付録C"} <= {tags[flow] for flow in runbooks}
    for word, flow in SEARCHES.items():
        hits = [one.first.flow for one in found if word.lower() in one.name_in(NAME, "ja").lower()]
        assert flow in hits, f"{word} finds {hits}"


def test_the_first_page_of_the_list_has_every_frequent_symptom() -> None:
    """Prefect shows ten rows."""
    for language in ("en", "ja"):
        names = [symptoms.start_name_in(NAME, language), *(one.name_in(NAME, language) for one in read_symptoms())]
        first = sorted(names)[: symptoms.FIRST_PAGE]
        assert first[0] == names[0]
        frequent = [one.name_in(NAME, language) for one in read_symptoms() if one.place == symptoms.FREQUENT]
        assert len(frequent) >= 6
        assert set(frequent) <= set(first)


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Iterator[Path]:
    """An environment, and in Prefect the deployments of three of its runbooks with their symptoms."""
    path = tmp_path / "start.toml"
    path.write_text(TOML.format(name=NAME, base=tmp_path))
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(path))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    (tmp_path / "audit.log").write_text("")
    register.register(NAME)
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_UI_URL: UI}):
        client.create_work_pool(WorkPoolCreate(name=NAME, type="process"), overwrite=True)
        try:
            yield tmp_path
        finally:
            for one in deployed().values():
                client.delete_deployment(one.id)
            client.delete_work_pool(NAME)


def deployed() -> dict[str, DeploymentResponse]:
    """By flow and name."""
    with get_client(sync_client=True) as client:
        found = client.read_deployments(limit=200)
    return {
        f"{start_page.flow_in({'entrypoint': one.entrypoint})}/{one.name}": one
        for one in found
        if one.parameters.get("environment") == NAME
    }


def publish(language: Language, *flows: str) -> None:
    """As deployments.deploy does it, for some runbooks."""
    content = yaml.safe_load(Path("prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    own = [one for one in content if start_page.flow_in(one) in flows and one["name"] == PLACEHOLDER]
    plain = [{**one, "schedules": [], "description": shown(one["entrypoint"], language), "version": "1"} for one in own]
    filled = entries.filled(plain, {"OPS_ENVIRONMENT": NAME})
    finding = list(start_page.symptom_entries(filled, NAME, language, "on-demand"))
    entries.publish([*filled, *finding], [], deployed(), language)
    about = shown("flows.troubleshooting.start_here.start_here", language)
    start_page.describe_start(deployed(), NAME, about, language)


def links(text: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Runbook → where its last link leads, and what that fills in."""
    found = re.findall(r"\[([a-z-]+)\]\((\S+?)\)", text)
    return {
        name: (urlsplit(address).path, json.loads(parse_qs(urlsplit(address).query)["parameters"][0]))
        for name, address in found
    }


def text_of(report: Report, name: str) -> str:
    return next(item.text for item in report.evidence if item.name.startswith(name))


def test_what_is_published_is_in_the_environment_s_language(env: Path) -> None:
    """Names have both, since the search finds names only; titles, descriptions and help have one."""
    seen = dict[Language, tuple[str, str, dict[str, str]]]()
    languages: tuple[Language, ...] = ("en", "ja")
    for language in languages:
        publish(language, "start-here", "diagnose-database")
        one = deployed()[f"diagnose-database/{NAME}"]
        fields = one.parameter_openapi_schema["properties"]
        start = deployed()[f"start-here/{NAME}"].description or ""
        seen[language] = (start, one.description or "", {name: field["description"] for name, field in fields.items()})
    assert f"start-here/0 ここから始める Start here ({NAME})" in deployed()
    assert (
        f"diagnose-database/1 データベースが遅い・ロック待ち Database is slow: waits and locks ({NAME})" in deployed()
    )
    (start_en, about_en, help_en), (start_ja, about_ja, help_ja) = seen["en"], seen["ja"]
    assert "| Database is slow: waits and locks |" in start_en
    assert "| データベースが遅い・ロック待ち |" in start_ja
    assert start_ja.startswith("ここから始める")
    assert "Database is slow" not in start_ja
    assert about_en.startswith("Diagnose database (appendix A)\n\nWalks the decision tree")
    assert about_ja.startswith("データベース接続エラーのトラブルシューティング (付録A)\n\n判断ツリーをたどり")
    assert about_ja.count("\n- ") == about_en.count("\n- ") > 3, "lists stay lists"
    assert help_en["environment"].startswith("Environment (lab")
    assert help_ja["environment"] == "対象の環境 (lab, staging, production …)"
    assert help_en.keys() == help_ja.keys()


def test_the_deployments_and_the_report_lead_to_the_forms(env: Path) -> None:
    publish("en", "start-here", "search-audit-log", "review-performance")
    there = deployed()
    assert set(there) == {
        f"start-here/{NAME}",
        f"search-audit-log/{NAME}",
        f"review-performance/{NAME}",
        f"start-here/0 Start here ここから始める ({NAME})",
        f"search-audit-log/1 Who logged in as admin: login history 管理者ログインの履歴・監査ログ ({NAME})",
        f"search-audit-log/6 Attack: many failed logins 不正アクセス・ログインの失敗 ({NAME})",
        f"review-performance/5 Application is slow アプリが遅い ({NAME})",
    }
    slow = there[f"review-performance/5 Application is slow アプリが遅い ({NAME})"]
    assert slow.parameters == {"environment": NAME, "days": 1}
    assert (slow.tags[-1], slow.schedules, "on-demand" in slow.tags) == ("symptom", [], False)
    description = there[f"start-here/{NAME}"].description or ""
    assert description.startswith("Start here (appendix A, §8)\n\n### ")
    assert description == there[f"start-here/0 Start here ここから始める ({NAME})"].description
    plain = there[f"review-performance/{NAME}"].id
    assert links(description)["review-performance"] == (f"{plain}/run", {"environment": NAME, "days": 1})
    assert "full-restore" not in description, "this environment does not have it"
    assert set(links(description)) == {"review-performance", "search-audit-log"}

    at, why = datetime.now(UTC), "server lost: 2 h would be lost, RPO 1 h"
    bad = Recoverable("redis", "red", why, at, 7200.0, 9.0, "backup", "full-restore", "", "the writes are lost")
    good = Recoverable(
        "database", "green", "", at, 0.0, 16.0, "point in time", "restore-to-point", "2026-11-28", "none"
    )
    (env / "reports").mkdir()
    found = RecoveryStanding(NAME, "", "Asia/Tokyo", at, 3600.0, 14400.0, (good, bad), (), None, None)
    standing.save(env / "reports", found)
    with pytest.raises(RunbookFailed):
        search_audit_log(NAME, since="no time")
    with hold(NAME, env / "reports", "Vacuum database", "maintenance", 0.0):
        report = start_here(NAME)
    assert report.status is Status.WARN, "never CRITICAL"
    judged = {one.name: one for one in report.findings}
    assert judged["redis recoverable now"].value == why
    assert [one.flow for one in judged["redis recoverable now"].follow] == ["full-restore", "check-recovery-objectives"]
    assert judged["database recoverable now"].status is Status.OK
    assert "the newest is search-audit-log start-trial" in judged["failed runs of the last 7 days"].value
    assert re.search(
        rf"read \[its report\]\({UI}/artifacts/artifact/\S+\)", judged["failed runs of the last 7 days"].hint
    )
    assert re.search(rf"\({UI}/runs/flow-run/\S+\) \(\[report\]\({UI}/artifacts", text_of(report, "Last failed runs"))
    assert "RunbookFailed" not in text_of(report, "Last failed runs")
    assert "start-here" not in text_of(report, "Running"), "not itself"
    assert report.facts["lock held by"].startswith("Vacuum database, process ")
    assert links(text_of(report, "Symptom"))["search-audit-log"][0] == (
        f"/v2/deployments/deployment/{there[f'search-audit-log/{NAME}'].id}/run"
    )

    # Without Prefect: commands, and the reports on disk.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [])
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
            report = start_here.fn(NAME)
    assert "python -m flows.launch full-restore environment=start-trial" in text_of(report, "Symptom")
    assert "-search-audit-log.json" in text_of(report, "Last CRITICAL reports")
