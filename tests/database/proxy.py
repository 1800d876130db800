"""A proxy between a flow and its server, which kills the server at a chosen statement: no luck, no load, no sleep.

Every process of the server is killed with SIGKILL, and nobody listens any more until `back()`. The statement is the
one with a number or a text, and dies `before` the server sees it, or `answered`: done there, and its answer lost; or
`streaming`: the client has its first row of a COPY.
https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tests.fixtures.servers import PostgresServer, free_port

When = Literal["before", "answered", "running", "streaming"]
_NO_ENCRYPTION = (80877103, 80877104)
_CANCEL = 80877102
_starter = ThreadPoolExecutor(1)  # a server ends with the thread that started it (PR_SET_PDEATHSIG)


@dataclass(frozen=True)
class Kill:
    """At which statement: its number (from 0), or the one that contains a text, behind one that contains `behind`, when
    as many such were let through as `skip` says. `running` waits for `until` first; with `comes_back` the server is
    there again before anybody learns that it was away.
    """

    at: int | str
    when: When = "before"
    skip: int = 0
    behind: str = ""
    until: Callable[[], object] = bool
    comes_back: bool = False


class Proxy:
    """Listens on a port of its own for as long as the server lives."""

    def __init__(self, server: PostgresServer) -> None:
        self.server, self.port = server, free_port()
        self.statements: list[str] = []
        self.killed = threading.Event()
        self._done = threading.Event()
        self._kill: Kill | None = None
        self._passed, self._behind = 0, False
        self._lock = threading.Lock()
        self._up = threading.Event()  # cleared while the server is away and comes back: new clients wait
        self._up.set()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._listen()

    def arm(self, kill: Kill | None) -> None:
        """Kill at that statement, counted from now; None: only count."""
        self.killed.clear()
        self._done.clear()
        self.statements.clear()
        self._passed, self._behind = 0, not (kill and kill.behind)
        self._kill = kill

    def back(self) -> None:
        """The server is started again, whether it was killed or not."""
        self._kill = None
        assert not self.killed.is_set() or self._done.wait(120), "the server was to be killed"
        if not self.server.is_running:
            self.server.start()
        self._listen()

    def close(self) -> None:
        """Listen no more, and end every connection."""
        self._refuse()
        for one in list(self._open):
            _end(one)

    def _refuse(self) -> None:
        if self._listener:
            _end(self._listener)
            self._listener.close()
            self._listener = None

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=32)
            threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        with contextlib.suppress(OSError, EOFError), client:
            startup = _startup(client)
            self._up.wait(120)
            with socket.create_connection(("127.0.0.1", self.server.port)) as server:
                self._open.add(server)
                for one in (client, server):  # else each answer waits for a delayed acknowledgement
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(startup)
                held = threading.Event()
                threading.Thread(target=self._answers, args=[server, client, held], daemon=True).start()
                self._questions(client, server, held)
            self._open.discard(server)
        self._open.discard(client)

    def _questions(self, client: socket.socket, server: socket.socket, held: threading.Event) -> None:
        while True:
            kind, message = _message(client)
            kill = self._hit(kind, message)
            if kill and kill.when == "before":
                return self._die(kill)
            if kill and kill.when in ("answered", "streaming"):
                held.set()
            server.sendall(message)
            if kill and kill.when == "running":
                kill.until()
                return self._die(kill)

    def _answers(self, server: socket.socket, client: socket.socket, held: threading.Event) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, message = _message(server)
                streaming = self._kill is not None and self._kill.when == "streaming"
                if not held.is_set() or streaming:
                    client.sendall(message)
                # Ready for the next one: this one is done; or a row of a COPY.
                if held.is_set() and self._kill and kind == (b"d" if streaming else b"Z"):
                    return self._die(self._kill)
        _end(client)  # the server closed it
        return None

    def _hit(self, kind: bytes, message: bytes) -> Kill | None:
        if kind not in (b"Q", b"P"):
            return None
        start = 5 if kind == b"Q" else message.index(b"\0", 5) + 1
        text = message[start : message.index(b"\0", start)].decode()
        with self._lock:
            number = len(self.statements)
            self.statements.append(text)
            kill = self._kill
            if kill is None or self.killed.is_set():
                return None
            wanted = kill.at == number if isinstance(kill.at, int) else kill.at in text and self._behind
            self._behind = self._behind or kill.behind in text
            self._passed += wanted
            if not wanted or self._passed <= kill.skip:
                return None
            self.killed.set()
            return kill

    def _die(self, kill: Kill) -> None:
        before = list(self._open)
        if kill.comes_back:
            self._up.clear()
        else:
            self._refuse()
        self.server.crash()
        if kill.comes_back:
            _starter.submit(self.server.start).result()
            self._up.set()
        for one in before if kill.comes_back else list(self._open):
            _end(one)
        self._done.set()


def _startup(client: socket.socket) -> bytes:
    while True:
        head = _exactly(client, 8)
        length, code = struct.unpack("!II", head)
        if code in _NO_ENCRYPTION:
            client.sendall(b"N")
        elif code == _CANCEL:
            raise EOFError("a request to cancel is not passed on")
        else:
            return head + _exactly(client, length - 8)


def _message(source: socket.socket) -> tuple[bytes, bytes]:
    head = _exactly(source, 5)
    return head[:1], head + _exactly(source, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (chunk := source.recv(size - len(data))):
            raise EOFError
        data += chunk
    return bytes(data)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
