"""What a port of a Redis server speaks: asked only where a connection failed.

A plain server waits for the end of a TLS greeting as if it were a command, and a TLS one ends a plain connection
without a word: the error alone does not tell a wrong setting from a dead server.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

PATIENCE_SECONDS = 2.0


def speaks_plain(host: str, port: int) -> bool:
    """Whether it answers a PING without TLS, in whatever words (https://valkey.io/topics/protocol/)."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), PATIENCE_SECONDS) as plain:
        plain.sendall(b"PING\r\n")
        return plain.recv(1) in (b"+", b"-")
    return False


def speaks_tls(host: str, port: int) -> bool:
    """Whether it shakes hands in TLS; its certificate is not looked at, and nothing is told to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError), socket.create_connection((host, port), PATIENCE_SECONDS) as plain:
        try:
            with context.wrap_socket(plain):
                return True
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")  # it wants a client's certificate, or an older version
    return False


def mistaken(address: str, *, tls: bool) -> str:
    """What is wrong with [redis] tls for a port, as the end of a sentence; "" where that is not known to be wrong."""
    host, _, port = address.rpartition(":")
    place = host.strip("[]"), int(port)
    if tls and speaks_plain(*place):
        return "uses no TLS on this port, but [redis] tls is true"
    if not tls and speaks_tls(*place):
        return "uses TLS on this port, but [redis] tls is false"
    return ""
