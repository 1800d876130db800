"""Channels: each sends a message or raises within its deadline. Its errors contain no address and no key.

Prefect's notification blocks are not used: those of Slack and Teams hide failures, none has a deadline for the whole
answer, and an alert must be sent even if Prefect is down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import smtplib
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from blocks.people.alerts import Alerts, Channel
from runbook.errors import OpsError, Unreachable, excerpt
from runbook.files import durable
from runbook.kinds import action
from runbook.masking import without
from tasks.alerts import message as form
from tasks.alerts.message import AlertMessage

MOST_BYTES = 2000
LEAST_LETTERS = 8


class _NoAddress(logging.Filter):
    """httpx logs each request's address, which is the secret of a webhook."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            hidden = (f"{one.scheme}://{one.host}/…" if isinstance(one, httpx.URL) else one for one in record.args)
            record.args = tuple(hidden)
        return True


logging.getLogger("httpx").addFilter(_NoAddress())


@action
def send_message(alerts: Alerts, channel: Channel, contact: str, message: AlertMessage) -> None:
    """Send a message by one channel.

    Raises:
        Unreachable: the channel did not accept it within `deadline_seconds`.
    """
    deliver(alerts, channel, contact, message)


def deliver(alerts: Alerts, channel: Channel, contact: str, message: AlertMessage) -> None:
    """`send_message` outside a flow run."""
    senders: dict[Channel, Callable[[], None]] = {
        "slack": lambda: _post(alerts.slack_url, form.slack(message), alerts.deadline_seconds),
        "teams": lambda: _post(alerts.teams_url, form.teams(message), alerts.deadline_seconds),
        "webhook": lambda: _post(alerts.webhook_url, form.plain(message), alerts.deadline_seconds),
        "pagerduty": lambda: _post(
            SecretStr(alerts.pagerduty_url),
            form.pagerduty(message, alerts.pagerduty_key.get_secret_value()),
            alerts.deadline_seconds,
        ),
        "email": lambda: _mail(alerts, alerts.contacts[contact].email, message),
        "file": lambda: _append(Path(alerts.file), message),
    }
    try:
        _within(alerts.deadline_seconds, senders[channel])
    except OpsError as error:
        raise Unreachable(f"{channel}: {excerpt(masked(error.message, alerts), 160)}") from None


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run with a deadline: a server that sends a byte now and then defeats the timeout of a socket."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="alert", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise OpsError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0] if isinstance(errors[0], OpsError) else OpsError(f"{type(errors[0]).__name__}")


def _post(url: SecretStr, body: dict[str, Any], seconds: float) -> None:
    try:
        with httpx.stream("POST", url.get_secret_value(), json=body, timeout=seconds) as answer:
            if not answer.is_success:
                said = next(answer.iter_bytes(MOST_BYTES), b"").decode(errors="replace")
                raise OpsError(f"refused: {answer.status_code} {said}")
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise OpsError(f"not sent ({type(error).__name__})") from None


def _mail(alerts: Alerts, to: str, message: AlertMessage) -> None:
    secured = ssl.create_default_context()
    try:
        server: smtplib.SMTP
        if alerts.smtp_security == "tls":
            server = smtplib.SMTP_SSL(
                alerts.smtp_host, alerts.smtp_port, timeout=alerts.deadline_seconds, context=secured
            )
        else:
            server = smtplib.SMTP(alerts.smtp_host, alerts.smtp_port, timeout=alerts.deadline_seconds)
        with contextlib.closing(server):
            if alerts.smtp_security == "starttls":
                server.starttls(context=secured)
            if alerts.smtp_user:
                server.login(alerts.smtp_user, alerts.smtp_password.get_secret_value())
            server.send_message(form.mail(message, alerts.email_from, to))
            with contextlib.suppress(smtplib.SMTPException, OSError):  # the mail is accepted
                server.quit()
    except smtplib.SMTPResponseException as error:
        said = error.smtp_error if isinstance(error.smtp_error, str) else error.smtp_error.decode(errors="replace")
        raise OpsError(f"refused: {error.smtp_code} {said}") from None
    except smtplib.SMTPRecipientsRefused:
        raise OpsError("refused: the recipient") from None
    except (smtplib.SMTPException, OSError, ValueError) as error:
        raise OpsError(f"not sent ({type(error).__name__})") from None


def _append(path: Path, message: AlertMessage) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(form.plain(message), ensure_ascii=False) + "\n")
        durable.sync(path)
    except OSError as error:
        raise OpsError(f"not written ({error.strerror})") from None


def masked(text: str, alerts: Alerts) -> str:
    """The text without the channels' secrets; a server may repeat only the path of an address. Mask before cutting."""
    secrets = {
        part for secret in alerts.secrets() for part in (secret, *secret.split("/")) if len(part) >= LEAST_LETTERS
    }
    return without(text, secrets)
