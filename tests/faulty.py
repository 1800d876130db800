"""A real HTTP server on loopback that fails on request: what receivers and providers of tests have in common.

with serving(server):
    with server.fault("/slack", "hang"):
        ...
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, TypeVar

Fault = TypeVar("Fault", bound=str)
Server = TypeVar("Server", bound="FaultyServer[Any]")


class FaultyServer(ThreadingHTTPServer, Generic[Fault]):
    """`faults`: what is asked for (a path, a provider) → how it fails."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.faults: dict[str, Fault] = {}
        self.released = threading.Event()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def fault(self, of: str, fault: Fault) -> Iterator[None]:
        """It fails in this way while the block runs."""
        self.faults[of] = fault
        try:
            yield
        finally:
            del self.faults[of]


class FaultyHandler(BaseHTTPRequestHandler):
    """What hangs and drips does so until the server ends."""

    server: FaultyServer[Any]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """No noise."""

    def hang(self) -> None:
        """No answer."""
        self.server.released.wait()

    def drip(self, head: bytes, drop: bytes) -> None:
        """An answer without an end."""
        with contextlib.suppress(OSError):
            self.wfile.write(head)
            while not self.server.released.wait(0.05):
                self.wfile.write(drop)
        self.close_connection = True

    def send(self, status: int, content: bytes, **headers: str) -> None:
        """A whole answer; an underscore in a header's name is a hyphen."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """It answers while the block runs."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
