"""A TCP proxy between boto3 and an S3 server, with faults: cut connections, and answers of an overloaded server.

    with Proxy(server.port) as proxy:
        proxy.cut_requests(after_bytes=12_000_000)      # of all that is sent from now on
        proxy.cut_answers(after_bytes=100_000, times=3)
        proxy.answer(503, "SlowDown", times=2)
        proxy.alter_request()
        proxy.clock_seconds = 90                        # the server's clock is that far ahead

The Host header that was signed is passed on as it is.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from types import TracebackType

BLOCK = 65536
_DATE = re.compile(rb"\r\nDate: ([^\r]+ GMT)\r\n", re.IGNORECASE)
HEAD = 4096  # more than boto3 writes before a body, and less than it writes of one at once


@dataclass
class _Cut:
    after_bytes: int = 0
    times: int = 0
    passed: int = 0


@dataclass
class Proxy:
    """Listens while the block runs. `sent_bytes` and `answered_bytes` count what was passed on, `faults` what was done."""

    target_port: int
    sent_bytes: int = 0
    answered_bytes: int = 0
    faults: int = 0
    clock_seconds: float = 0
    _requests: _Cut = field(default_factory=_Cut)
    _answers: _Cut = field(default_factory=_Cut)
    _refusals: list[tuple[int, bytes]] = field(default_factory=list)
    _alters: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_requests(self, after_bytes: int, times: int = 1) -> None:
        """Once this much was sent: cut that connection. Then count again, `times` times; without end: -1."""
        self._requests = _Cut(after_bytes, times)

    def cut_answers(self, after_bytes: int, times: int = 1) -> None:
        """Likewise for what the server answers."""
        self._answers = _Cut(after_bytes, times)

    def answer(self, status: int, code: str, times: int = 1) -> None:
        """Answer the next `times` requests with an S3 error; they do not reach the server."""
        self.answer_with(status, f"<Error><Code>{code}</Code><Message>the proxy says so</Message></Error>", times)

    def answer_with(self, status: int, body: str, times: int = 1) -> None:
        """Likewise with an answer of one's own."""
        self._refusals = [(status, body.encode())] * times
        self.drop()  # a request on an open connection would pass

    def alter_request(self, times: int = 1) -> None:
        """Flip a bit in the next block that is too large to be a head: a body's."""
        self._alters = times

    def heal(self) -> None:
        """No more faults."""
        self._requests, self._answers, self._refusals = _Cut(), _Cut(), []

    def drop(self) -> None:
        """Close every connection."""
        with self._lock:
            opened, self._open = self._open, set()
        for connection in opened:
            _close(connection)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            refusal = self._refusals.pop() if self._refusals else None
            self._open.add(client)
            self.faults += refusal is not None
        with contextlib.suppress(OSError):
            if refusal:
                _refuse(client, *refusal)
                _close(client)
                return
            server = socket.create_connection(("127.0.0.1", self.target_port))
            back = threading.Thread(target=self._pass, args=(server, client, False), daemon=True)
            back.start()
            self._pass(client, server, True)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket, request: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(BLOCK):
                if self._cuts(self._requests if request else self._answers, len(content)):
                    break
                with self._lock:  # first: whoever has got it finds it counted
                    if request:
                        self.sent_bytes += len(content)
                    else:
                        self.answered_bytes += len(content)
                target.sendall(self._altered(content) if request else self._dated(content))
        _close(source)
        _close(target)

    def _dated(self, content: bytes) -> bytes:
        """An answer's Date by another clock: as long as it was."""
        if not self.clock_seconds or not (found := _DATE.search(content)):
            return content
        there = parsedate_to_datetime(found[1].decode()) + timedelta(seconds=self.clock_seconds)
        return content.replace(found[1], format_datetime(there, usegmt=True).encode(), 1)

    def _altered(self, content: bytes) -> bytes:
        with self._lock:
            if not self._alters or len(content) < HEAD:
                return content
            self._alters -= 1
            self.faults += 1
        return content[:-1] + bytes([content[-1] ^ 1])

    def _cuts(self, cut: _Cut, size: int) -> bool:
        with self._lock:
            cut.passed += size
            if not cut.times or cut.passed < cut.after_bytes:
                return False
            cut.times -= 1
            cut.passed = 0
            self.faults += 1
            return True


def _refuse(client: socket.socket, status: int, answer: bytes) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        if not (more := client.recv(BLOCK)):
            return
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    lines = [line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:]]
    length = next((int(value) for name, value in lines if name == b"content-length"), 0)
    while len(body) < length and (more := client.recv(BLOCK)):
        body += more
    start = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    client.sendall(f"{start}Content-Length: {len(answer)}\r\n\r\n".encode() + answer)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
