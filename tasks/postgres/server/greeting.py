"""A PostgreSQL server's first message, by SQLSTATE: libpq hides it for a refused login, and its text is localised.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Literal

from blocks.postgres.refusals import TOO_MANY
from blocks.postgres.server import Postgres
from runbook.kinds import probe
from tasks.host.ports import dial, reach_of

ANSWER_SECONDS, UNPROMPTED_SECONDS = 10.0, 5.0
PROTOCOL = 196_608  # 3.0
LINE = b"\r\n\r\n"
"""Servers of text protocols answer the end of a line or header; a hanging PostgreSQL does not."""
NOT_NOW = "57P03"
State = Literal["ready", "closed", "unreachable", "unknown name", "silent", "not PostgreSQL", "not now", "full"]


@dataclass(frozen=True)
class Greeting:
    """The server's state. `ready`: it starts the authentication. `detail`: its own message."""

    state: State
    detail: str

    @property
    def answers(self) -> bool:
        """Whether a PostgreSQL server answers, even if it accepts no connections."""
        return self.state in ("ready", "not now", "full")


@probe
def read_greeting(postgres: Postgres) -> Greeting:
    """Open a connection as the application's role, read the first message, and close it."""
    try:
        line = dial(postgres.host, postgres.port)
    except OSError as error:
        found = reach_of(error)
        return Greeting("closed" if found.open else found.state, found.detail)  # type: ignore[arg-type]
    with line:
        line.settimeout(UNPROMPTED_SECONDS)
        try:
            line.sendall(_startup(postgres.user, postgres.database))
            try:
                return _parsed(_received(line))
            except TimeoutError:
                line.settimeout(ANSWER_SECONDS - UNPROMPTED_SECONDS)
                line.sendall(LINE)
                return _parsed(_received(line))
        except TimeoutError:
            return Greeting("silent", f"it accepted the connection and sent nothing for {ANSWER_SECONDS:g} s")
        except OSError as error:
            return Greeting("not PostgreSQL", error.strerror or str(error))


def _startup(user: str, database: str) -> bytes:
    words = b"".join(word.encode() + b"\0" for word in ("user", user, "database", database))
    return struct.pack("!II", len(words) + 9, PROTOCOL) + words + b"\0"


def _received(line: socket.socket) -> bytes:
    """The first message (a letter, its length, its body), or its part if the server closes the connection."""
    got = b""
    wanted = 5
    while len(got) < wanted and (chunk := line.recv(4096)):
        got += chunk
        if len(got) >= 5 and got[:1] in (b"R", b"E"):
            wanted = 1 + min(int(struct.unpack("!I", got[1:5])[0]), 8192)
    return got


def _parsed(message: bytes) -> Greeting:
    if message[:1] == b"E" and len(message) > 5:
        fields = {part[:1]: part[1:].decode(errors="replace") for part in message[5:].split(b"\0") if part}
        code, text = fields.get(b"C", ""), fields.get(b"M", "")
        if code == NOT_NOW:
            return Greeting("not now", text)
        if code == TOO_MANY:
            return Greeting("full", text)
        return Greeting("ready", text)  # a real login reports it better: this connection was without TLS
    if message[:1] == b"R":
        return Greeting("ready", "it starts the authentication")
    does = "uses another protocol" if message else "closes the connection"
    return Greeting("not PostgreSQL", f"the process on that port {does}")
