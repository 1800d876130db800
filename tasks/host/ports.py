"""Whether a server's port can be reached, and why not: nothing listens, no host answers, the name is unknown."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runbook.kinds import probe

CONNECT_SECONDS = 3.0
State = Literal["open", "closed", "unreachable", "unknown name"]
_AWAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ETIMEDOUT)


@dataclass(frozen=True)
class Reach:
    """`closed`: the host answers, and nothing listens on the port."""

    state: State
    detail: str

    @property
    def open(self) -> bool:
        """Whether the port accepts connections."""
        return self.state == "open"


def dial(host: str, port: int) -> socket.socket:
    """Try a TCP connection, or PostgreSQL's Unix socket if `host` is a directory."""
    if not host.startswith("/"):
        return socket.create_connection((host, port), CONNECT_SECONDS)
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(CONNECT_SECONDS)
    try:
        line.connect(str(Path(host) / f".s.PGSQL.{port}"))
    except OSError:
        line.close()
        raise
    return line


def reach_of(error: OSError) -> Reach:
    """The reason of a failed connection."""
    said = error.strerror or str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        return Reach("unknown name", said)
    if isinstance(error, TimeoutError) or error.errno in _AWAY:
        return Reach("unreachable", said)
    return Reach("closed", said)


@probe
def read_reach(host: str, port: int) -> Reach:
    """Connect, send nothing, disconnect."""
    try:
        dial(host, port).close()
    except OSError as error:
        return reach_of(error)
    return Reach("open", f"{host}:{port} takes connections")
