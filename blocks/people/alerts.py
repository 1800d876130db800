"""Whom to tell, by which channels, and who is told next where nobody answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from prefect.blocks.core import Block
from pydantic import BaseModel, Field, SecretStr, model_validator

Channel = Literal["pagerduty", "slack", "teams", "email", "webhook", "file"]
COLUMNS = ("role", "for", "name", "phone", "e-mail", "support plan")
PAGERDUTY = "https://events.pagerduty.com/v2/enqueue"


class Contact(BaseModel, extra="forbid"):
    """Somebody on duty. `owners`: whose runbooks are theirs (DBA, セキュリティ …), beside the path."""

    role: str
    name: str = ""
    phone: str = ""
    email: str = ""
    owners: list[str] = []
    channels: list[Channel] = Field(default=[], description="in which order; empty: the environment's")


class Vendor(BaseModel, extra="forbid"):
    """Somebody outside, and what was bought of them."""

    name: str
    plan: str = ""
    phone: str = ""
    url: str = ""


class Level(BaseModel, extra="forbid"):
    """Who is told when nobody has acknowledged for so many minutes."""

    contacts: list[str] = Field(min_length=1)
    minutes: float = Field(default=0, ge=0)
    severe_only: bool = False


class Alerts(Block):
    """Contacts, vendors, the path of escalation, and the channels. A channel's secret is a field of its own: masked,
    and kept through an edit in the Prefect UI."""

    _block_type_name = "Ops alerts"
    _block_type_slug = "ops-alerts"

    contacts: dict[str, Contact] = Field(min_length=1)
    vendors: list[Vendor] = Field(default=[])
    path: list[Level] = Field(min_length=1)
    stakeholders: list[str] = Field(default=[], description="contacts that are informed when an incident is declared")
    channels: list[Channel] = Field(min_length=1, description="tried in this order until one accepts the message")
    deadline_seconds: float = Field(default=10, gt=0, description="for one channel; then the next is tried")
    reopen_hours: float = Field(default=24, gt=0, description="acknowledged so long ago, it is a new incident")
    keep_days: float = Field(default=90, gt=0, description="over for so long, an incident's file goes; reports stay")

    slack_url: SecretStr = Field(default=SecretStr(""), description="an incoming webhook")
    teams_url: SecretStr = Field(default=SecretStr(""), description="a workflow's address that takes adaptive cards")
    webhook_url: SecretStr = Field(default=SecretStr(""), description="gets JSON")
    pagerduty_key: SecretStr = Field(default=SecretStr(""), description="routing key of an Events API v2 integration")
    pagerduty_url: str = PAGERDUTY
    smtp_host: str = ""
    smtp_port: int = Field(default=587, ge=1, le=65535)
    smtp_security: Literal["starttls", "tls", "none"] = "starttls"
    smtp_user: str = ""
    smtp_password: SecretStr = SecretStr("")
    email_from: str = ""
    file: str = Field(default="", description="a test channel: messages are lines of JSON in it")

    @model_validator(mode="after")
    def _all_there(self) -> Alerts:
        named = {name for level in self.path for name in level.contacts} | set(self.stakeholders)
        if strangers := sorted(named - set(self.contacts)):
            raise ValueError(f"no contact is named {', '.join(strangers)}")
        if [level.minutes for level in self.path] != sorted(level.minutes for level in self.path):
            raise ValueError("path goes from few minutes to many")
        for name, contact in self.contacts.items():
            for channel in contact.channels or self.channels:
                if not self._set_up(channel):
                    raise ValueError(f"{name} uses the channel {channel}, which is not set up")
            if not self.channels_of(name):
                raise ValueError(f"{name} uses e-mail only, and has no address")
        return self

    def _set_up(self, channel: Channel) -> bool:
        needed: dict[Channel, str] = {
            "pagerduty": self.pagerduty_key.get_secret_value(),
            "slack": self.slack_url.get_secret_value(),
            "teams": self.teams_url.get_secret_value(),
            "webhook": self.webhook_url.get_secret_value(),
            "email": self.smtp_host and self.email_from,
            "file": self.file,
        }
        return bool(needed[channel])

    def channels_of(self, name: str) -> list[Channel]:
        """By what somebody is told, in the order in which it is tried."""
        contact = self.contacts[name]
        return [one for one in contact.channels or self.channels if one != "email" or contact.email]

    def at(self, number: int, owner: str) -> list[str]:
        """Whom the path's level tells; the owner's own contacts are told with the first."""
        own = [name for name, one in self.contacts.items() if owner and owner in one.owners] if number == 0 else []
        return list(dict.fromkeys([*self.path[number].contacts, *own]))

    def secrets(self) -> list[str]:
        """What no message of an error may repeat."""
        found = (self.slack_url, self.teams_url, self.webhook_url, self.pagerduty_key, self.smtp_password)
        return [text for one in found if (text := one.get_secret_value())]

    def rows(self, owners: Collection[str] = ()) -> Sequence[Sequence[str]]:
        """For people (COLUMNS): the owners' own contacts first, then the path, then everybody else, then vendors."""
        on_path = [name for level in self.path for name in level.contacts]
        own = [name for name, one in self.contacts.items() if set(one.owners) & set(owners)]
        people = [self.contacts[name] for name in dict.fromkeys([*own, *on_path, *self.contacts])]
        return [
            *((one.role, ", ".join(one.owners), one.name, one.phone, one.email, "") for one in people),
            *(("vendor", "", one.name, one.phone, one.url, one.plan) for one in self.vendors),
        ]
