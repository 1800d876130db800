"""What people are told, as text and as each channel wants it."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import format_datetime, localtime
from typing import Any, Literal

Kind = Literal["trigger", "acknowledge", "resolve", "declare"]


@dataclass(frozen=True)
class Message:
    """`incident` is the same in all messages of an incident; `number` names this one, so that one that was sent twice
    can be seen to be the same."""

    kind: Kind
    incident: str
    number: str
    environment: str
    severe: bool
    subject: str
    text: str
    to: str = ""

    @property
    def title(self) -> str:
        """One line."""
        return " ".join(f"{'🛑' if self.severe else '⚠️'} [{self.environment}] {self.subject}".split())[:250]


def slack(message: Message) -> dict[str, Any]:
    """An incoming webhook's."""
    text = f"*{message.title}*\n{message.text}"
    return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}


def teams(message: Message) -> dict[str, Any]:
    """A workflow's: an adaptive card."""
    blocks = [
        {"type": "TextBlock", "text": message.title, "weight": "Bolder", "wrap": True},
        *({"type": "TextBlock", "text": line, "wrap": True} for line in message.text.splitlines() if line),
    ]
    card = {"type": "AdaptiveCard", "version": "1.4", "body": blocks}
    return {
        "type": "message",
        "attachments": [{"contentType": "application/vnd.microsoft.card.adaptive", "content": card}],
    }


def pagerduty(message: Message, key: str) -> dict[str, Any]:
    """The Events API's, version 2. What is sent twice is one incident there (`dedup_key`)."""
    action = {"declare": "trigger"}.get(message.kind, message.kind)
    payload = {
        "summary": message.title,
        "source": message.environment,
        "severity": "critical" if message.severe else "error",
        "custom_details": {"text": message.text, "to": message.to},
    }
    return {"routing_key": key, "event_action": action, "dedup_key": message.incident, "payload": payload}


def plain(message: Message) -> dict[str, Any]:
    """Of a webhook, and of the test channel."""
    return {
        "kind": message.kind,
        "incident": message.incident,
        "number": message.number,
        "environment": message.environment,
        "severe": message.severe,
        "to": message.to,
        "title": message.title,
        "text": message.text,
    }


def mail(message: Message, sender: str, to: str) -> EmailMessage:
    """E-mail; messages of an incident are one thread."""
    letter = EmailMessage()
    letter["Subject"] = message.title
    letter["From"], letter["To"] = sender, to
    letter["Date"] = format_datetime(localtime())
    letter["Message-ID"] = f"<{message.number}@interview-ops>"
    letter["References"] = f"<{message.incident}@interview-ops>"
    letter["Importance"] = "high" if message.severe else "normal"
    letter.set_content(message.text)
    return letter
