"""Pages that render.py does not write: an approval's form, a drill's page and the recovery board in Japanese."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from flows.recovery.drills import page
from flows.recovery.objectives import board_page
from runbook.guard.approval_form import approval_form, describe_request
from runbook.language import say
from runbook.language.catalogue import Catalogue, read
from runbook.report import Report
from tasks.recovery_points.standing import Recoverable, RecoveryStanding

NOW = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
MESSAGES = {
    "One-time code": "ワンタイムコード",
    "Only this plan is approved": "この計画だけを承認する",
    "Without an approval within {minutes} minutes the run fails": "{minutes} 分以内に承認されなければ、実行は失敗します",
    "every function works": "全機能正常動作",
    "every service runs": "すべてのサービスが稼働中",
    "to be verified": "確認項目",
    "Recovery board": "復旧ボード",
    "resource": "対象",
    "never measured": "未測定",
    "never proven by a restore: run verify-backup": "リストアで証明されていません: verify-backup を実行してください",
}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Catalogue({**read("ja"), **MESSAGES})
    monkeypatch.setattr(say, "catalogue", lambda language: known)


def drilled(language: say.Language) -> Report:
    report = Report("DR drill", "lab", language=language, started=NOW, finished=NOW)
    report.passed("every function works", value="every service runs")
    report.fact("to be verified", "every function works")
    report.table("every function works", ("resource", "n"), [("database", 1)])
    return report


def shown(language: say.Language) -> dict[str, str]:
    """Each page."""
    report = drilled(language)
    resource = Recoverable(
        "database",
        "yellow",
        "never proven by a restore: run verify-backup",
        NOW,
        1.0,
        None,
        "",
        "",
        "",
        "nothing of app is lost",
    )
    standing = RecoveryStanding("lab", "", "Asia/Tokyo", NOW, 3600, 3600, (resource,), (), None, None)
    with say.use_language(language):
        form = str(approval_form("p1", "", pages=True).model_json_schema())
        request = describe_request(report, "p1", "", 1800)
    return {
        "form": form,
        "request": request,
        "drill": page.html(report),
        "board": board_page.html([standing], NOW, language),
        "artifact": board_page.markdown([standing], NOW, language),
    }


EXPECTED = {
    "form": ("One-time code", "Only this plan is approved"),
    "request": ("Without an approval within 30 minutes the run fails",),
    "drill": ('lang="en"', "every function works", "every service runs", "to be verified", "resource"),
    "board": (
        'lang="en"',
        "Recovery board",
        "resource",
        "never measured",
        "never proven by a restore: run verify-backup",
    ),
    "artifact": ("Recovery board", "resource", "never measured"),
}


def test_each_page_is_in_the_language_of_its_environment() -> None:
    english, japanese = shown("en"), shown("ja")
    known = {**MESSAGES, 'lang="en"': 'lang="ja"'}
    for name, texts in EXPECTED.items():
        for text in texts:
            expected = known.get(text, "30 分以内に承認されなければ、実行は失敗します")
            assert (text in english[name], expected in english[name]) == (True, False), (name, text)
            assert (text in japanese[name], expected in japanese[name]) == (False, True), (name, text)
