"""Where a certificate is served: `host:443`, `smtp://host:25`, `postgres://host:5432`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

Protocol = Literal["https", "smtp", "postgres"]
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_SERVER = re.compile(
    r"((?P<protocol>https|smtp|postgres)://)?((?P<name>[^@/\s]+)@)?(\[(?P<v6>[0-9a-fA-F:]+)\]|(?P<host>[^@/:\s]+))"
    r":(?P<port>[0-9]{1,5})"
)


@dataclass(frozen=True)
class TlsServer:
    """A server that shows a certificate: over TLS itself, after SMTP's STARTTLS, or after PostgreSQL's SSLRequest."""

    protocol: Protocol
    name: str
    host: str
    port: int
    text: str

    @classmethod
    def parse(cls, text: str) -> TlsServer:
        """Of `[https://|smtp://|postgres://][name@]host:port`; `name` is asked for, where it is not the host.

        Raises:
            ValueError: it is no such address.
        """
        found = _SERVER.fullmatch(text.strip())
        host = found["v6"] or found["host"] if found else ""
        name = (found["name"] or host) if found else ""
        if not found or not 0 < int(found["port"]) < 65536 or not (found["v6"] or NAME.fullmatch(host)):
            raise ValueError(f"“{text[:60]}” is no server: write host:443, smtp://host:25 or postgres://host:5432")
        if not (found["v6"] or NAME.fullmatch(name)):
            raise ValueError(f"“{name[:60]}” is no name of a server: write it like www.example.com@10.0.0.5:443")
        return cls(cast(Protocol, found["protocol"] or "https"), name, host, int(found["port"]), text.strip())


def certificate_names(text: str) -> tuple[str, ...]:
    """The names of one certificate, separated by spaces or commas; the first is its directory's name too.

    Raises:
        ValueError: one of them is no name, or the first one is a wildcard.
    """
    names = tuple(text.replace(",", " ").lower().split())
    wrong = [name for name in names if not NAME.fullmatch(name.removeprefix("*."))]
    if not names or wrong or names[0].startswith("*."):
        raise ValueError(f"“{text[:60]}” names no certificate: write its names, e.g. example.com www.example.com")
    return names
