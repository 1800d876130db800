"""A reverse proxy between the application and its AI providers, which can make one provider fail.

    python -m tasks.ai.proxy --environment staging

It listens on one address per provider (`[ai_providers] proxy`), the application's base URL for that provider, and
forwards every request to the provider. The control address sets faults: `POST /control/azure {"failing": true,
"fault": "429"}`; `GET /health` returns each provider's state and the number of requests it received. All faults end
with the process. For disposable environments only.

Bedrock's requests are signed again: an AWS signature covers the host name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx

from blocks.ai_providers import AIProviders, Provider, ProviderFault
from blocks.environment import Environment
from runbook.drivers import exit_code
from runbook.errors import OpsError
from tasks.ai.upstream import signed, upstream_of
from tasks.faults.disposable import require_disposable

UPSTREAM_SECONDS = 300.0
MOST_SECONDS = 600.0
MOST_BYTES = 64 << 20
POLL_SECONDS = 0.05
# RFC 9110, 7.6.1, and those that httpx writes itself.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding")
) | {"upgrade", "host", "content-length"}
_RESET = struct.pack("ii", 1, 0)


@dataclass
class ProxyGate:
    """One provider's state. `changed` is set when a fault ends: then waiting requests continue."""

    provider: Provider
    upstream: str
    fault: ProviderFault | None = None
    delay_seconds: float = 0.0
    received: int = 0
    changed: threading.Event = field(default_factory=threading.Event)


class ProviderProxy:
    """The listening addresses and the control address, open while the block runs.

    Raises:
        OpsError: an address is in use, or a provider with an address has no upstream.
    """

    def __init__(self, ai: AIProviders) -> None:
        self.ai = ai
        self.gates = {name: ProxyGate(name, upstream_of(ai, name)) for name in ai.proxy}
        self.client = httpx.Client(timeout=UPSTREAM_SECONDS, follow_redirects=False)
        self._servers = dict[str, _Server]()
        self._lock = threading.Lock()

    def __enter__(self) -> ProviderProxy:
        try:
            for name in self.gates:
                self._open(name, self.ai.proxy[name], _Forward)
            self._open("control", urlsplit(self.ai.control).netloc, _Control)
        except OpsError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.changed.set()
        for name in list(self._servers):
            self._close(name)
        self.client.close()

    def set_fault(self, name: Provider, fault: ProviderFault | None, delay_seconds: float = 0.0) -> None:
        """Make one provider fail in a way, or answer again (None)."""
        with self._lock:
            gate = self.gates[name]
            gate.changed.set()
            gate.changed = threading.Event()
            gate.fault, gate.delay_seconds = fault, delay_seconds
            if fault == "refused" and name in self._servers:
                self._close(name)
            elif fault != "refused" and name not in self._servers:
                self._open(name, self.ai.proxy[name], _Forward)

    def state(self) -> dict[str, Any]:
        """What `GET /health` returns."""
        failing = {name: "failing" if gate.fault else "ok" for name, gate in self.gates.items()}
        received = {name: gate.received for name, gate in self.gates.items()}
        return {"status": "healthy", "proxy": True, "providers": failing, "received": received}

    def _open(self, name: str, address: str, handler: type[_Handler]) -> None:
        host, _, port = address.rpartition(":")
        try:
            server = _Server((host, int(port)), handler)
        except (OSError, ValueError) as error:
            raise OpsError(f"cannot listen on {address}: {error}", "correct [ai_providers] proxy and control") from None
        server.proxy, server.name = self, name
        server.thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
        server.thread.start()
        self._servers[name] = server

    def _close(self, name: str) -> None:
        server = self._servers.pop(name)
        server.shutdown()
        server.server_close()
        server.thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: ProviderProxy
    name: str
    thread: threading.Thread


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = UPSTREAM_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: an address can contain a key."""

    def body(self) -> bytes | None:
        """The request's body; None, after a 411 or 413, if its length is unknown or too large."""
        try:
            length = int(self.headers.get("Content-Length", 0))
        except ValueError:
            length = -1
        if length < 0 or self.headers.get("Transfer-Encoding"):
            self.answer(411, "send a Content-Length")
        elif length > MOST_BYTES:
            self.answer(413, f"more than {MOST_BYTES >> 20} MiB")
        else:
            return self.rfile.read(length)
        return None

    def answer(self, status: int, said: str | Mapping[str, Any], **headers: str) -> None:
        """Answer with JSON; a sentence becomes an error in the format of Azure and Google."""
        body = {"error": {"code": str(status), "message": said}} if isinstance(said, str) else said
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Connection": "close"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Forward(_Handler):
    """Forwards a request, or fails as the provider's gate says."""

    def serve(self) -> None:
        proxy, gate = self.server.proxy, self.server.proxy.gates[self.server.name]  # type: ignore[index]
        self.close_connection = True
        if (body := self.body()) is None:
            return
        gate.received += 1
        match gate.fault:
            case "500":
                self.answer(500, f"{gate.provider} fails on purpose: a rehearsal")
            case "429":
                self.answer(429, f"{gate.provider} refuses on purpose: a rehearsal", Retry_After="60")
            case "timeout":
                gate.changed.wait(MOST_SECONDS)
                self._reset()
            case "refused":  # a request that arrived while the address was being closed
                self._reset()
            case "slow":
                gate.changed.wait(gate.delay_seconds)
                self._forward(proxy, gate, body)
            case None:
                self._forward(proxy, gate, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def _forward(self, proxy: ProviderProxy, gate: ProxyGate, body: bytes) -> None:
        url = gate.upstream + self.path
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        if gate.provider == "bedrock":
            headers = signed(proxy.ai, self.command, url, headers, body)
        try:
            with proxy.client.stream(self.command, url, headers=headers, content=body) as answer:
                self._send_head(answer)
                for chunk in answer.iter_raw():
                    self.wfile.write(chunk)
        except httpx.HTTPError as error:
            with contextlib.suppress(OSError):
                self.answer(502, f"{gate.provider} does not answer the proxy: {type(error).__name__}")
        except OSError:  # the application closed the connection
            return

    def _send_head(self, answer: httpx.Response) -> None:
        self.send_response_only(answer.status_code, answer.reason_phrase)
        for name, value in answer.headers.multi_items():
            if name.lower() not in _HOP_BY_HOP - {"content-length"}:
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _reset(self) -> None:
        """Reset the connection without an answer, like a dead host."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.connection.shutdown(socket.SHUT_RD)


class _Control(_Handler):
    """States and faults."""

    def do_GET(self) -> None:
        """`/health`."""
        self.close_connection = True
        self.answer(200, self.server.proxy.state()) if self.path == "/health" else self.answer(404, "GET /health")

    def do_POST(self) -> None:
        """`/control/{provider}`."""
        self.close_connection = True
        name, proxy = self.path.removeprefix("/control/"), self.server.proxy
        try:
            wanted = json.loads(self.body() or b"null")
            failing, fault = wanted["failing"], wanted.get("fault", "500")
            delay = float(wanted.get("delay_seconds", 0))
            known = name in proxy.gates and isinstance(failing, bool) and fault in get_args(ProviderFault)
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            self.answer(400, 'POST /control/{provider} {"failing": true, "fault": "429"}')
            return
        try:
            proxy.set_fault(name, fault if failing else None, delay)  # type: ignore[arg-type]
            self.answer(200, proxy.state())
        except OpsError as error:
            self.answer(500, error.message)


@contextlib.contextmanager
def until_terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tasks.ai.proxy", description="a proxy before the AI providers")
    parser.add_argument("--environment", default=os.environ.get("OPS_ENVIRONMENT", ""), required=False)
    try:
        env = Environment.find(parser.parse_args().environment)
        require_disposable(env)
        if not env.ai_providers.proxy:
            raise OpsError("[ai_providers] proxy is empty", "set one listening address per provider")
        with until_terminated() as ended, ProviderProxy(env.ai_providers):
            print(f"listening: {', '.join(f'{name} {at}' for name, at in env.ai_providers.proxy.items())}", flush=True)
            ended.wait()
    except OpsError as error:
        print(f"{error.message}. Next: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
