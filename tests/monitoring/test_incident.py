"""The procedures that a drill calls: open, acknowledge, declare, tell stakeholders, resolve; and the block's own rules."""

from __future__ import annotations

import pytest

from blocks.people.alerts import Alerts
from flows.monitoring import incident
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from runbook.run import runbook
from tests.monitoring.duty import Duty, finding


def play(duty: Duty) -> tuple[Report, incident.Incident]:
    env = duty.env
    with runbook("Trial drill", env) as report:
        found = incident.open_incident(report, env, what="訓練: x", severity="severe", owner="DBA", key="drill")
        found = incident.acknowledge(report, env, found.id, by="佐藤")
        found = incident.declare(report, env, found.id, by="佐藤")
        found = incident.notify_stakeholders(report, env, found)
        found = incident.notify_stakeholders(report, env, found)
        found = incident.resolve(report, env, found.id, by="佐藤", note="訓練の終了")
    return report, found


def test_a_drill_opens_acknowledges_declares_tells_and_resolves(duty: Duty) -> None:
    report, found = play(duty)
    assert report.status is Status.OK
    subjects = [
        f"{letter['To'].partition('@')[0]} {letter['Subject'].partition('] ')[2]}" for letter in duty.mail.letters
    ]
    assert subjects == [
        *("oncall 訓練: x", "dba 訓練: x"),
        *("dba 佐藤 handles it: 訓練: x", "oncall 佐藤 handles it: 訓練: x"),
        "manager incident declared: 訓練: x",
        *(f"{who} resolved: 訓練: x" for who in ("dba", "manager", "oncall")),
    ]
    declared = duty.mail.to("manager@example.com")[0].get_content()
    assert "declared by: 佐藤 (" in declared
    assert "acknowledged by: 佐藤 (" in declared
    assert found.acknowledged_seconds is not None
    assert (found.declared_by, found.resolved_by, found.note) == ("佐藤", "佐藤", "訓練の終了")


def declared(duty: Duty) -> Report:
    """With a mail server that dies after the first letter."""
    env = duty.env
    with runbook("Trial drill", env) as report:
        found = incident.open_incident(report, env, what="x")
        duty.mail.refuses = True
        incident.notify_stakeholders(report, env, found)
    return report


def test_stakeholders_that_cannot_be_told(duty: Duty) -> None:
    with pytest.raises(RunbookFailed) as error:
        declared(duty)
    told = finding(error.value.report, "マネージャー was notified")
    assert told.startswith("CRITICAL no channel accepted the message — phone マネージャー: 000-0000-0005")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('contacts = ["lead"]', 'contacts = ["chief"]', "no contact is named chief"),
        ('stakeholders = ["manager"]', 'stakeholders = ["nobody"]', "no contact is named nobody"),
        ("minutes = 15", "minutes = 45", "path goes from few minutes to many"),
        ('channels = ["email"]', 'channels = ["file"]', "on-call uses the channel file, which is not set up"),
        (', email = "lead@example.com"', "", "lead uses e-mail only, and has no address"),
        (
            'channels = ["email"]',
            'channels = ["fax"]',
            r"\[alerts\] channels\.0 is wrong: found “fax” — expected: 'pagerduty', 'slack'",
        ),
        (
            'phone = "000-0000-0004"',
            'fone = "000-0000-0004"',
            r"contacts\.lead\.fone is wrong: found an unknown key .*did you mean phone",
        ),
    ],
)
def test_what_is_wrong_is_found_when_it_is_read(duty: Duty, old: str, new: str, said: str) -> None:
    path = duty.base / "trial.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(OpsError, match=said) as error:
        _ = duty.env
    assert error.value.message.startswith("trial.toml: [alerts]")


def test_what_goes_into_a_block_comes_out_of_it_masked(duty: Duty) -> None:
    duty.describe(channels=("slack", "pagerduty", "email"))
    alerts = duty.env.alerts
    shown = alerts.model_dump_json() + repr(alerts)
    assert "geheim" not in shown
    assert isinstance(alerts, Alerts)
    assert all("geheim" in secret for secret in alerts.secrets())
