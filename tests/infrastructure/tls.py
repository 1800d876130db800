"""Servers that show a certificate, really, on loopback: in TLS, after STARTTLS; and some that do not."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE = 60.0


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port; every connection is given to `answer` in a thread, and closed after it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads: list[threading.Thread] = []

        def one(connection: socket.socket) -> None:
            connection.settimeout(PATIENCE)
            with connection, contextlib.suppress(OSError):  # TLS's errors too: whoever looked has seen enough
                answer(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):  # the end
                while True:
                    threads.append(threading.Thread(target=one, args=(server.accept()[0],), daemon=True))
                    threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(PATIENCE)


def context_of(directory: Path, chain: str = "fullchain.pem") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")  # it serves weak ones too
    context.load_cert_chain(directory / chain, directory / "privkey.pem")
    return context


def over_tls(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(1)

    return answer


def over_smtp(context: ssl.SSLContext, *, offers: bool = True) -> Callable[[socket.socket], None]:
    """As far as STARTTLS (RFC 3207)."""

    def answer(connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        connection.sendall(b"220-mail.test\r\n220 ready\r\n")
        assert lines.readline().startswith(b"EHLO")
        connection.sendall(b"250-mail.test\r\n250-STARTTLS\r\n250 HELP\r\n" if offers else b"250 mail.test\r\n")
        if lines.readline() == b"STARTTLS\r\n":
            connection.sendall(b"220 go on\r\n")
            over_tls(context)(connection)

    return answer


def silent(connection: socket.socket) -> None:
    """It hangs until the other side has had enough."""
    while connection.recv(4096):
        pass


def says(text: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(text)
        silent(connection)

    return answer
