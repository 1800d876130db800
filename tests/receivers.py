"""Who receives alerts, on loopback: an HTTP server and an SMTP server, real ones, with faults on request.

with http_receiver() as web:
    with web.fault("/slack", "500"):
        ...                         # what is posted there is refused
    web.got["/hook"]                # the bodies that were taken
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections import defaultdict
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, Literal

from aiosmtpd.controller import Controller  # type: ignore[import-untyped]
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session  # type: ignore[import-untyped]

from tests.faulty import FaultyHandler, FaultyServer, serving
from tests.servers import free_port

Fault = Literal["500", "302", "hang", "drip", "close", "echo"]


class HttpReceiver(FaultyServer[Fault]):
    """`got`: path → bodies that were taken; `tried`: every path, in order."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.got: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.tried: list[str] = []


class _Handler(FaultyHandler):
    server: HttpReceiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.tried.append(self.path)
        match self.server.faults.get(self.path):
            case "500":
                self._answer(500, "no_service")
            case "302":
                self._answer(302, "elsewhere")
            case "echo":  # as some do: the address is in the answer
                self._answer(404, f"there is no {self.server.url}{self.path}, nor {self.path}: {json.dumps(body)}")
            case "hang":
                self.hang()
            case "drip":
                self.drip(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n")
            case "close":
                self.close_connection = True
            case _:
                self.server.got[self.path].append(body)
                self._answer(202, "ok")

    def _answer(self, status: int, text: str) -> None:
        self.send(status, text.encode())


def http_receiver() -> contextlib.AbstractContextManager[HttpReceiver]:
    """On a free port while the block runs."""
    return serving(HttpReceiver())


class Mailbox:
    """aiosmtpd's handler. `letters` were taken; while `refuses` none is. `then` is done with each."""

    def __init__(self) -> None:
        self.letters: list[EmailMessage] = []
        self.refuses = False
        self.port = 0
        self.then: Callable[[], object] = lambda: None

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if self.refuses:
            return "451 4.3.0 the disk of the mail server is full"
        letter = message_from_bytes(envelope.content, policy=default)
        assert isinstance(letter, EmailMessage)
        self.letters.append(letter)
        self.then()
        return "250 OK"

    def to(self, address: str) -> list[EmailMessage]:
        return [letter for letter in self.letters if letter["To"] == address]


@contextlib.contextmanager
def smtp_receiver(context: ssl.SSLContext | None = None, login: tuple[str, str] | None = None) -> Iterator[Mailbox]:
    """With a certificate it asks for STARTTLS, with a login for that too."""

    def authenticated(server: SMTP, session: Session, envelope: Envelope, mechanism: str, given: Any) -> AuthResult:
        known = isinstance(given, LoginPassword) and (given.login.decode(), given.password.decode()) == login
        return AuthResult(success=known, handled=False)

    box = Mailbox()
    port = free_port()  # none of those from which outgoing connections take theirs until it listens
    controller = Controller(
        box,
        hostname="127.0.0.1",
        port=port,
        ready_timeout=120,
        tls_context=context,
        require_starttls=context is not None,
        authenticator=authenticated if login else None,
        auth_required=login is not None,
    )
    controller.start()
    box.port = port
    try:
        yield box
    finally:
        controller.stop()
