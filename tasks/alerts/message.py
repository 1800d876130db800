"""What people are told, as text and as each channel wants it.

Names and logs that others write are in it, so no channel may read more in them than text: no mention of everybody, no
link under another name, no formatting, no line that looks like one of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import format_datetime, localtime
from typing import Any, Literal

Kind = Literal["trigger", "acknowledge", "resolve", "declare"]
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that turn the direction of text around, and halves of characters, which UTF-8 has not."""
_EVERYBODY = re.compile(r"@(?=(?:channel|here|everyone|all)\b)", re.IGNORECASE)
_ADDRESS = re.compile(r"(https?://[^\s<>\"'、。（）]+)")


def shown(text: str) -> str:
    """Text as every channel can carry it and every reader sees it."""
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


@dataclass(frozen=True)
class AlertMessage:
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
        line = f"{'🛑' if self.severe else '⚠️'} [{self.environment}] {self.subject}"
        return " ".join(shown(" ".join(line.split())).split())[:250]

    @property
    def body(self) -> str:
        """Several lines."""
        return shown(self.text)


def slack(message: AlertMessage) -> dict[str, Any]:
    """An incoming webhook's, also of the servers that take Slack's messages: some of those read a plain `@channel`.

    https://docs.slack.dev/messaging/formatting-message-text
    """
    text = _EVERYBODY.sub("@\N{WORD JOINER}", f"{message.title}\n{message.body}")
    return {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), "mrkdwn": False}


def teams(message: AlertMessage) -> dict[str, Any]:
    """A workflow's: an adaptive card of text runs, which have no Markdown. An address links to what it shows.

    https://learn.microsoft.com/en-us/adaptive-cards/schema-explorer/text-run
    """
    blocks = [_line(message.title, weight="Bolder"), *(_line(line) for line in message.body.splitlines() if line)]
    card = {"type": "AdaptiveCard", "version": "1.4", "body": blocks}
    return {
        "type": "message",
        "attachments": [{"contentType": "application/vnd.microsoft.card.adaptive", "content": card}],
    }


def _line(text: str, **style: str) -> dict[str, Any]:
    runs = [{"type": "TextRun", "text": part, **style} for part in _ADDRESS.split(text) if part]
    linked = [
        run | {"selectAction": {"type": "Action.OpenUrl", "url": run["text"]}}
        if _ADDRESS.fullmatch(run["text"])
        else run
        for run in runs
    ]
    return {"type": "RichTextBlock", "inlines": linked}


def pagerduty(message: AlertMessage, key: str) -> dict[str, Any]:
    """The Events API's, version 2. What is sent twice is one incident there (`dedup_key`)."""
    action = {"declare": "trigger"}.get(message.kind, message.kind)
    payload = {
        "summary": message.title,
        "source": message.environment,
        "severity": "critical" if message.severe else "error",
        "custom_details": {"text": message.body, "to": message.to},
    }
    return {"routing_key": key, "event_action": action, "dedup_key": message.incident, "payload": payload}


def plain(message: AlertMessage) -> dict[str, Any]:
    """Of a webhook, and of the test channel."""
    return {
        "kind": message.kind,
        "incident": message.incident,
        "number": message.number,
        "environment": message.environment,
        "severe": message.severe,
        "to": message.to,
        "title": message.title,
        "text": message.body,
    }


def mail(message: AlertMessage, sender: str, to: str) -> EmailMessage:
    """E-mail; messages of an incident are one thread."""
    letter = EmailMessage()
    letter["Subject"] = message.title
    letter["From"], letter["To"] = sender, to
    letter["Date"] = format_datetime(localtime())
    letter["Message-ID"] = f"<{message.number}@interview-ops>"
    letter["References"] = f"<{message.incident}@interview-ops>"
    letter["Importance"] = "high" if message.severe else "normal"
    letter.set_content(message.body)
    return letter
