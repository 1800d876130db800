"""TLS for a scratch server: it connects to a port on this host's loopback, and its data is forwarded encrypted.

A server program can lack TLS, and none checks the name in a certificate when it replicates. Here certificate and name
are checked as for every other connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator

from blocks.redis.server import CONNECT_SECONDS, Redis
from runbook.errors import OpsError

PIECE_BYTES = 1 << 18


@contextlib.contextmanager
def relayed(block: Redis) -> Iterator[tuple[str, int]]:
    """Host and port at which a program on this host reaches the server of `block` without TLS: its own if it uses none,
    otherwise a port on loopback that closes at the end of the block. A client there still has to log in."""
    if not block.tls:
        yield block.host, block.port
        return
    relay = _Relay(block)
    thread = threading.Thread(target=relay.run, name="redis-relay", daemon=True)
    thread.start()
    if not relay.ready.wait(CONNECT_SECONDS):
        raise OpsError("no port on this host's loopback is free", "check its network")
    try:
        yield "127.0.0.1", relay.port
    finally:
        relay.end()
        thread.join(CONNECT_SECONDS)


class _Relay:
    """A listener with its own event loop."""

    def __init__(self, block: Redis) -> None:
        self._block, self.port = block, 0
        self.ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    def run(self) -> None:
        """Serve until the end."""
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    def end(self) -> None:
        """Close everything."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self._stop.wait()
        server.close()
        carrying = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.CancelledError), contextlib.closing(writer):
            there, back = await asyncio.open_connection(
                self._block.host, self._block.port, ssl=trust(self._block), server_hostname=self._block.host
            )
            with contextlib.closing(back):
                ways = [asyncio.create_task(_pass(reader, back)), asyncio.create_task(_pass(there, writer))]
                _, pending = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in pending:
                    way.cancel()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()


def trust(block: Redis) -> ssl.SSLContext:
    """The trusted certificates and the client certificate of the block's other connections."""
    context = ssl.create_default_context(cafile=block.tls_ca_file or None)
    if block.tls_certificate_file:
        context.load_cert_chain(block.tls_certificate_file, block.tls_key_file or None)
    return context
