"""Which addresses are this machine's: the same TOML is read by a worker on each of several hosts."""

from __future__ import annotations

import functools
import ipaddress
import socket

import psutil

LOCAL = ("localhost", "127.0.0.1", "::1", "")


def is_here(host: str) -> bool:
    """Whether a server's address, or the directory of its socket, is this machine's."""
    return host in LOCAL or host.startswith("/") or _is_own(host)


@functools.lru_cache(maxsize=256)  # a resolver that is down answers after seconds
def _is_own(host: str) -> bool:
    """Whether a name resolves to an address of one of this machine's interfaces."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        return True
    own = {address.address.partition("%")[0] for name in psutil.net_if_addrs().values() for address in name}
    return bool(found & own)
