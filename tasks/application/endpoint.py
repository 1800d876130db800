"""The address that users are sent to: the file that a proxy or DNS reads (`[endpoint]`, §8.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blocks.places import Application, Endpoint
from runbook.errors import OpsError
from runbook.files import durable
from runbook.guard.permit import Act
from runbook.kinds import action, probe

SEND = "send users by"


@dataclass(frozen=True)
class Sent:
    """The address before ("" if the file did not exist), and the address now."""

    before: str
    after: str


@probe
def read_endpoint(endpoint: Endpoint) -> str:
    """The address that users are sent to; "" if none is set yet.

    Raises:
        OpsError: the file cannot be read.
    """
    return _read(endpoint)


@action(of=lambda endpoint: Act(SEND, endpoint.file), idempotent=True)
def send_users(endpoint: Endpoint, application: Application) -> Sent:
    """Send users to an application: write the file atomically and durably.

    Raises:
        OpsError: the file cannot be written.
    """
    before, path = _read(endpoint), Path(endpoint.file)
    try:
        durable.write(path, application.url + "\n")
    except OSError as error:
        raise OpsError(
            f"{path} cannot be written: {error.strerror}", "let this user write it and its directory"
        ) from None
    return Sent(before, application.url)


def _read(endpoint: Endpoint) -> str:
    try:
        return Path(endpoint.file).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{endpoint.file} cannot be read: {why}", "correct [endpoint] file") from None
