"""An environment that has nothing but people on duty, and receivers of what they are told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blocks.environment import Environment
from flows.monitoring.incident import incidents
from tasks.alerts.incident import Incident
from tests.fixtures.receivers import HttpReceiver, Mailbox

NAME = "trial"
TOKEN = "T00hook-4711-geheim"
KEY = "pd-key-4712-geheim"
PASSWORD = "mail-4713-geheim"
SECRETS = {
    "OPS_TEST_SLACK": f"{{url}}/services/{TOKEN}",
    "OPS_TEST_TEAMS": f"{{url}}/teams/{TOKEN}",
    "OPS_TEST_HOOK": f"{{url}}/hook/{TOKEN}",
    "OPS_TEST_PAGERDUTY": KEY,
    "OPS_TEST_MAIL": PASSWORD,
}
SLACK, TEAMS, HOOK, PAGER = f"/services/{TOKEN}", f"/teams/{TOKEN}", f"/hook/{TOKEN}", "/v2/enqueue"
TOML = """
name = "{name}"
title = "試験環境"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[alerts]
channels = {channels}
deadline_seconds = {seconds}
slack_url_env = "OPS_TEST_SLACK"
teams_url_env = "OPS_TEST_TEAMS"
webhook_url_env = "OPS_TEST_HOOK"
pagerduty_key_env = "OPS_TEST_PAGERDUTY"
pagerduty_url = "{url}/v2/enqueue"
smtp_host = "127.0.0.1"
smtp_port = {smtp}
smtp_security = "none"
email_from = "ops@example.com"
stakeholders = ["manager"]
path = [
    {{ contacts = ["on-call"], minutes = {minutes[0]} }},
    {{ contacts = ["lead"], minutes = {minutes[1]} }},
    {{ contacts = ["manager"], minutes = {minutes[2]} }},
    {{ contacts = ["executives"], minutes = {minutes[2]}, severe_only = true }},
]
vendors = [{{ name = "AWSサポート", plan = "Premium Support" }}]
[alerts.contacts]
on-call = {{ role = "オンコールSRE", name = "佐藤", phone = "000-0000-0001", email = "oncall@example.com", owners = ["SRE"] }}
dba = {{ role = "DBA", phone = "000-0000-0002", email = "dba@example.com", owners = ["DBA"] }}
lead = {{ role = "チームリード", phone = "000-0000-0004", email = "lead@example.com" }}
manager = {{ role = "マネージャー", phone = "000-0000-0005", email = "manager@example.com" }}
executives = {{ role = "経営層", phone = "000-0000-0006", email = "executives@example.com" }}
"""
MANUAL = (0, 15, 30)


@dataclass
class Duty:
    """The environment's file, written anew with other minutes or channels; and who was told."""

    base: Path
    web: HttpReceiver
    mail: Mailbox
    name: str = NAME

    def describe(
        self,
        *,
        minutes: tuple[float, float, float] = MANUAL,
        channels: tuple[str, ...] = ("email",),
        seconds: float = 60,
    ) -> None:
        text = TOML.format(
            name=self.name,
            base=self.base,
            url=self.web.url,
            smtp=self.mail.port,
            seconds=seconds,
            minutes=minutes,
            channels=json.dumps(channels),
        )
        (self.base / "trial.toml").write_text(text, encoding="utf-8")

    @property
    def env(self) -> Environment:
        return Environment.find(self.name)

    @property
    def told(self) -> list[str]:
        """Who got an e-mail, in order, by their names."""
        return [str(letter["To"]).partition("@")[0] for letter in self.mail.letters]

    def incidents(self) -> list[Incident]:
        return incidents(self.env).all()

    def written(self) -> str:
        """Every file that was left: reports, pages, incidents."""
        return "".join(path.read_text() for path in (self.base / "reports").rglob("*") if path.is_file())


def prepare(
    base: Path, web: HttpReceiver, mail: Mailbox, monkeypatch: pytest.MonkeyPatch, *, named: str = NAME
) -> Duty:
    """With the manual's minutes, and e-mail as the only channel."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value.format(url=web.url))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPS_ENVIRONMENT", named)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(base / "trial.toml"))
    duty = Duty(base, web, mail, named)
    duty.describe()
    return duty


def finding(report: Any, part: str) -> str:
    """The only finding of that name: its status, value and hint."""
    (found,) = [one for one in report.findings if part in one.name]
    return f"{found.status} {found.value} — {found.hint}"
