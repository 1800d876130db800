"""A TCP relay in front of a server of a disposable environment: it slows, refuses or hangs connections.

    python -m tasks.faults.relay --listen 127.0.0.1:6400 --target 127.0.0.1:6379 --control 127.0.0.1:6401

The application connects to `--listen`, and the relay to `--target`. `POST /control/relay {"failing": true, "fault":
"latency", "delay_seconds": 0.5}` at the control address sets a fault, `{"failing": false}` ends it; `GET /health`
returns the fault and the number of connections. Every fault ends with the process. It needs no root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import socketserver
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args

RelayFault = Literal["latency", "refused", "timeout"]
CHUNK_BYTES = 65536
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.05
_RESET = struct.pack("ii", 1, 0)
Address = tuple[str, int]


class Relay:
    """Open while the block runs.

    Raises:
        OSError: an address is in use.
    """

    def __init__(self, listen: Address, target: Address, control: Address) -> None:
        self.listen, self.target, self.control = listen, target, control
        self.fault: RelayFault | None = None
        self.delay_seconds = 0.0
        self.connections = 0
        self.ended = threading.Event()  # of the present fault
        self._open = set[socket.socket]()
        self._lock = threading.Lock()
        self._data: _Data | None = None
        self._control: _Control | None = None

    def __enter__(self) -> Relay:
        self._listen()
        self._control = _Control(self.control, _Commands)
        self._control.relay = self
        threading.Thread(target=self._control.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.set_fault(None)
        for server in (self._data, self._control):
            if server:
                server.shutdown()
                server.server_close()
        self._reset_all()

    def set_fault(self, fault: RelayFault | None, delay_seconds: float = 0.0) -> None:
        """From now on, also for open connections; None ends it. `refused` resets open connections."""
        with self._lock:
            self.fault, self.delay_seconds = fault, delay_seconds
            self.ended.set()
            self.ended = threading.Event()
            if fault == "refused" and self._data:
                self._data.shutdown()
                self._data.server_close()
                self._data = None
            elif fault != "refused" and not self._data:
                self._listen()
        if fault == "refused":
            self._reset_all()

    def state(self) -> dict[str, Any]:
        """The body of `GET /health`."""
        return {"relay": True, "fault": self.fault or "", "connections": self.connections}

    def carry(self, client: socket.socket) -> None:
        """One connection, until one side closes it."""
        self.connections += 1
        try:
            server = socket.create_connection(self.target, CONNECT_SECONDS)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        self._open |= {client, server}
        back = threading.Thread(target=self._pipe, args=(server, client), daemon=True)
        back.start()
        self._pipe(client, server)
        back.join()
        for one in (client, server):
            self._open.discard(one)
            one.close()

    def _pipe(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self.fault == "timeout":
                    self.ended.wait()
                elif self.fault == "latency":
                    self.ended.wait(self.delay_seconds)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _listen(self) -> None:
        self._data = _Data(self.listen, _Carry)
        self._data.relay = self
        threading.Thread(target=self._data.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    def _reset_all(self) -> None:
        for one in list(self._open):
            _reset(one)


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        one.shutdown(socket.SHUT_RDWR)


class _Data(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    relay: Relay


class _Carry(socketserver.BaseRequestHandler):
    server: _Data

    def handle(self) -> None:
        self.server.relay.carry(self.request)


class _Control(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    relay: Relay


class _Commands(BaseHTTPRequestHandler):
    server: _Control

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        """`/health`."""
        self._answer(200, self.server.relay.state()) if self.path == "/health" else self._answer(404, {})

    def do_POST(self) -> None:
        """`/control/relay`."""
        try:
            wanted = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            failing, fault = wanted["failing"], wanted.get("fault", "refused")
            delay = float(wanted.get("delay_seconds", 0))
            known = self.path == "/control/relay" and isinstance(failing, bool) and fault in get_args(RelayFault)
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            self._answer(400, {"error": 'POST /control/relay {"failing": true, "fault": "latency"}'})
            return
        try:
            self.server.relay.set_fault(fault if failing else None, delay)
            self._answer(200, self.server.relay.state())
        except OSError as error:
            self._answer(500, {"error": f"the address cannot be listened on again: {error.strerror}"})

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> int:
    """Relay until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tasks.faults.relay", description="a TCP relay that can fail")
    for name in ("listen", "target", "control"):
        parser.add_argument(f"--{name}", type=_address, required=True, metavar="HOST:PORT")
    given = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        with Relay(given.listen, given.target, given.control):
            print(f"relay {os.getpid()} listening on {given.listen[0]}:{given.listen[1]}", flush=True)
            ended.wait()
    except OSError as error:
        print(f"an address cannot be listened on: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
