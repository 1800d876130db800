"""escalate: who is told when, and nobody more once somebody has acknowledged."""

from __future__ import annotations

import re
import signal
from datetime import timedelta
from uuid import uuid4

import pytest
from prefect.utilities.callables import parameter_schema

from flows.monitoring.acknowledgement import acknowledge_incident
from flows.monitoring.escalation import escalate
from flows.monitoring.incident import due_next
from flows.monitoring.table import ALARMS
from runbook.errors import RunbookFailed
from runbook.failpoint import failpoint
from runbook.files.journal import Journal
from runbook.language import say
from runbook.language.catalogue import Catalogue, read
from runbook.report import Status
from tests.fixtures.killed import exit_code_at
from tests.monitoring.duty import NAME, Duty, finding

NOW = (0.0, 0.0, 0.0)
MESSAGES = {
    "problem": "内容",
    "severity": "重大度",
    "severe": "重大",
    "owner": "担当",
    "security team": "セキュリティ",
    "notified": "連絡済み",
    "nobody else yet": "なし (最初の連絡)",
    "acknowledge it if you handle it": "対応する人は確認してください",
    "acknowledged by": "対応者",
    "{acknowledged_by} handles it: {what}": "{acknowledged_by} が対応中: {what}",
    "{flow} does not start: check the worker": "{flow} が始まらない: worker を確認",
    "{title} (metric {name})": "{title} (メトリクス {name})",
    "API error rate": "API エラーレート",
    "{show} (limit {show2})": "{show} (上限 {show2})",
}


def test_who_is_on_call_is_told_and_acknowledges_and_nobody_else_is_told(duty: Duty) -> None:
    report = escalate.fn(NAME, what="主系データベースが応答しない", key="db")
    assert duty.told == ["oncall"]
    (letter,) = duty.mail.letters
    text = letter.get_content()
    (incident,) = duty.incidents()
    assert letter["Subject"] == "⚠️ [trial] 主系データベースが応答しない"
    for told in (
        "problem: 主系",
        "severity: normal",
        "試験環境 (trial)",
        "since: 20",
        " JST",
        "notified: nobody else yet",
        "佐藤 000-0000-0001",
    ):
        assert told in text, text
    assert f"python -m flows.monitoring.acknowledgement --environment trial --incident {incident.id} --by" in text
    assert finding(report, "オンコールSRE was notified") == "OK email — "

    acknowledged = acknowledge_incident.fn(NAME, by="佐藤", note="見ています")
    assert acknowledged.status is Status.OK
    duty.describe(minutes=NOW)
    report = escalate.fn(NAME)
    assert duty.told == ["oncall", "oncall"], "told again only of who has it"
    assert "佐藤 handles it" in duty.mail.letters[1]["Subject"]
    assert "note: 見ています" in duty.mail.letters[1].get_content()
    assert report.status is Status.OK
    (incident,) = duty.incidents()
    assert (incident.acknowledged_by, incident.note) == ("佐藤", "見ています")
    assert incident.acknowledged_seconds is not None
    assert incident.acknowledged_seconds > 0


def test_the_message_is_in_the_language_of_the_environment(duty: Duty, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Catalogue({**read("ja"), **MESSAGES})
    monkeypatch.setattr(say, "catalogue", lambda language: known)
    path = duty.base / "trial.toml"
    path.write_text(path.read_text().replace('timezone = "Asia/Tokyo"\n', 'timezone = "Asia/Tokyo"\nlanguage = "ja"\n'))
    what = f"{ALARMS['api.error_ratio'].full_title}: 40 % (limit 5 %): 8 of 20 requests failed"
    report = escalate.fn(NAME, what=what, owner="セキュリティ", severity="severe")
    acknowledge_incident.fn(NAME, by="佐藤")
    first, second = (letter.get_content() for letter in duty.mail.letters)
    shown = "API エラーレート (メトリクス api.error_ratio): 40 % (上限 5 %): リクエスト 20 件中 8 件が失敗"
    for told in (
        f"内容: {shown}",
        "重大度: 重大",
        "担当: セキュリティ",
        "連絡済み: なし (最初の連絡)",
        "対応する人は確認してください: ",
    ):
        assert told in first, first
    assert f"佐藤 が対応中: {shown}" in " ".join(str(duty.mail.letters[1]["Subject"]).split())
    assert "対応者: 佐藤 (" in second
    assert what in report.facts["incident"], "what is filed is English"


def test_of_a_run_that_died_it_says_how_far_it_came(duty: Duty) -> None:
    run, reports = str(uuid4()), duty.env.reports_directory
    reports.mkdir(parents=True)

    def dies() -> None:
        journal = Journal.begin(reports, NAME, "Restore database", run)
        journal.step("swap_databases", staged=False)
        failpoint("in the swap")

    assert exit_code_at("in the swap", dies) == -signal.SIGKILL
    report = escalate.fn(NAME, what="restore-database: Crashed", run=run)
    assert "interrupted, with an unknown result: swap databases" in report.facts["how far the dead run came"]
    assert duty.told == ["oncall"]


def test_nobody_acknowledges(duty: Duty) -> None:
    escalate.fn(NAME, what="x")
    (incident,) = duty.incidents()
    assert due_next(duty.env, incident) == incident.since + timedelta(minutes=15)
    escalate.fn(NAME)
    assert duty.told == ["oncall"], "not before its minutes are over, and nobody twice"
    duty.describe(minutes=(0, 0, 30))
    escalate.fn(NAME)
    assert duty.told == ["oncall", "lead"]
    (incident,) = duty.incidents()
    assert due_next(duty.env, incident) == incident.since + timedelta(minutes=30)
    duty.describe(minutes=NOW)
    report = escalate.fn(NAME)
    assert duty.told == ["oncall", "lead", "manager"]
    assert re.search(r"notified: オンコールSRE \(email .*, チームリード \(email ", duty.mail.letters[2].get_content())
    assert due_next(duty.env, duty.incidents()[0]) is None
    assert finding(report, "is acknowledged").startswith(
        "WARN x — phone the contacts in [alerts]: everybody was notified"
    )
    escalate.fn(NAME)
    assert duty.told == ["oncall", "lead", "manager"], "not the executives, and nobody again"


def test_a_severe_one_reaches_the_executives(duty: Duty) -> None:
    duty.describe(minutes=NOW)
    escalate.fn(NAME, severity="severe", what="x", key="k")
    assert duty.told == ["oncall", "lead", "manager", "executives"]
    assert duty.mail.letters[0]["Subject"].startswith("🛑")


def test_the_owner_s_contacts_are_told_at_once(duty: Duty) -> None:
    escalate.fn(NAME, what="x", owner="DBA")
    assert duty.told == ["oncall", "dba"]


def test_one_key_is_one_incident_until_it_is_resolved(duty: Duty) -> None:
    escalate.fn(NAME, what="x", key="k")
    report = escalate.fn(NAME, what="x", key="k")
    assert duty.told == ["oncall"]
    assert report.facts["happened again"].startswith("1 times since")
    escalate.fn(NAME, what="y", key="other")
    assert duty.told == ["oncall", "oncall"]
    duty.describe(minutes=NOW)
    escalate.fn(NAME, severity="severe", what="x", key="k")
    assert "executives" in duty.told, "it became severe"
    acknowledge_incident.fn(NAME, incident="k", by="鈴木", action="resolve")
    before = len(duty.told)
    escalate.fn(NAME, what="x", key="k")
    assert duty.told[before] == "oncall", "a new one"
    assert len(duty.incidents()) == 4


def test_acknowledged_long_ago_it_is_a_new_one(duty: Duty) -> None:
    escalate.fn(NAME, what="x", key="k")
    acknowledge_incident.fn(NAME, by="佐藤")
    escalate.fn(NAME, what="x", key="k")
    assert len(duty.incidents()) == 1
    path = duty.base / "trial.toml"
    path.write_text(path.read_text().replace("[alerts]\n", "[alerts]\nreopen_hours = 0.0000001\n"))
    escalate.fn(NAME, what="x", key="k")
    newest, old = duty.incidents()
    assert newest.waiting
    assert old.resolved_by == f"{newest.id}: it happened again"


def test_an_environment_that_says_nothing_of_whom_to_tell(duty: Duty) -> None:
    path = duty.base / "trial.toml"
    path.write_text(path.read_text().partition("[alerts]")[0])
    with pytest.raises(RunbookFailed, match="has no .alerts.: nobody can be notified. Next: add"):
        escalate.fn(NAME, what="x")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "佐藤"}, "0 incidents are open of trial. Next: name one of: none"),
        ({"by": "佐藤", "incident": "nothing"}, "“nothing” is not an incident of trial"),
        ({"by": " "}, "by is empty: nobody is named"),
    ],
)
def test_an_acknowledgement_that_cannot_be(duty: Duty, given: dict[str, str], said: str) -> None:
    with pytest.raises(RunbookFailed, match=said):
        acknowledge_incident.fn(NAME, **given)  # type: ignore[arg-type]


def test_the_form_asks_for_the_name_and_for_nothing_else(duty: Duty) -> None:
    """ "by" without a default: the UI's form does not send it off without, nor call it optional."""
    assert parameter_schema(acknowledge_incident.fn).required == ["environment", "by"]


def test_who_acknowledged_first_stays(duty: Duty) -> None:
    escalate.fn(NAME, what="x", key="k")
    acknowledge_incident.fn(NAME, by="佐藤")
    report = acknowledge_incident.fn(NAME, incident="k", by="鈴木")
    assert report.facts["acknowledged"].startswith("by 佐藤 at")
    assert duty.told == ["oncall", "oncall"]
