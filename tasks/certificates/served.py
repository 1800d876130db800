"""The certificate that a server presents: over TLS, SMTP's STARTTLS (RFC 3207) and PostgreSQL's SSLRequest
(https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL)."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509

from blocks.tls import TlsServer
from runbook.errors import Unreachable
from runbook.kinds import probe
from runbook.wait import until
from tasks.certificates.certificate import Certificate, read

PATIENCE_SECONDS = 10.0
RELOAD_SECONDS = 30.0
# During a reload a web server's old workers still answer for a moment.
IN_A_ROW = 3
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
MOST_LINE_BYTES = 4096
NO_TLS = "correct the address under [certificates] served, or turn TLS on there"


@dataclass(frozen=True)
class Served:
    """A server's certificate. `refused`: why OpenSSL does not trust it; `trouble`: the error (reason, next step)."""

    server: TlsServer
    certificate: Certificate | None = None
    version: str = ""
    refused: str = ""
    trouble: tuple[str, str] = ("", "")


class _NoTls(Exception):
    """The server offers no certificate; the reason and the next step."""


@probe
def read_served(server: TlsServer, authorities: str) -> Served:
    """Do a TLS handshake, trusting the system's authorities and those of a file. If that fails, do one without
    verification, to read the certificate. Nothing is sent after the handshake."""
    try:
        context = _strict(authorities)
    except OSError:  # OpenSSL's errors too
        context, why = None, f"not verified: {authorities} holds no authorities that can be read"
    try:
        try:
            if context:
                return _shake(server, context)
        except ssl.SSLError as error:
            why = _why(error)
        found = _shake(server, _lenient())
        return Served(server, found.certificate, found.version, why)
    except _NoTls as error:
        return Served(server, trouble=(error.args[0], error.args[1]))
    except ssl.SSLError as error:
        return Served(server, trouble=(f"no handshake: {_why(error)}", NO_TLS))
    except TimeoutError:
        hint = "check whether the server hangs, and the firewall; or correct the address under [certificates] served"
        return Served(server, trouble=(f"it did not answer within {PATIENCE_SECONDS:g} s", hint))
    except socket.gaierror:
        return Served(server, trouble=(f"unknown host {server.host}", "correct it under [certificates] served"))
    except OSError as error:
        what = f"no server answers: {error.strerror or error}"
        return Served(server, trouble=(what, "start it, or correct the address under [certificates] served"))
    except ValueError as error:
        what = f"its certificate cannot be read ({' '.join(str(error).split())[:100]})"
        return Served(server, trouble=(what, "replace it: clients cannot read it either"))


@probe
def wait_until_served(server: TlsServer, authorities: str, expected: Certificate) -> Served:
    """Wait up to RELOAD_SECONDS until it presents `expected` several times in a row. Returns the last answer."""
    shown: list[Served] = []

    def settled() -> bool:
        shown.append(read_served.work(server, authorities))
        last = [one.certificate for one in shown[-IN_A_ROW:]]
        return len(last) == IN_A_ROW and all(one is not None and one.parsed == expected.parsed for one in last)

    with contextlib.suppress(Unreachable):  # the last certificate is the answer
        until(settled, what=f"the new certificate at {server.text}", seconds=RELOAD_SECONDS, every_seconds=0.3)
    return shown[-1]


def _strict(authorities: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False  # names are judged separately
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # default of newer Pythons; browsers are less strict
    if authorities:
        context.load_verify_locations(authorities)
    return context


def _lenient() -> ssl.SSLContext:
    """Accept any certificate, also a weak or old one; no data is sent to the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def _why(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return "the server does not use TLS" if "wrong version number" in reason else reason


def _shake(server: TlsServer, context: ssl.SSLContext) -> Served:
    with (
        _connected(server, time.monotonic() + PATIENCE_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname=server.name) as tls,
    ):
        encoded = tls.getpeercert(binary_form=True)
        version = tls.version() or ""
    if not encoded:
        raise _NoTls("it presents no certificate", NO_TLS)
    return Served(server, read(x509.load_der_x509_certificate(encoded)), version)


@contextlib.contextmanager
def _connected(server: TlsServer, end: float) -> Iterator[socket.socket]:
    """A connection that is ready for the handshake, with the rest of the time as timeout."""
    with socket.create_connection((server.host, server.port), timeout=_rest(end)) as raw:
        if server.protocol == "smtp":
            _start_tls(raw, end)
        elif server.protocol == "postgres":
            raw.sendall(SSL_REQUEST)
            answer = _receive(raw, 1, end)
            if answer != b"S":
                off = ("PostgreSQL has TLS off", "set ssl = on, ssl_cert_file and ssl_key_file, and reload it")
                raise _NoTls(*(off if answer == b"N" else ("the server is not PostgreSQL", NO_TLS)))
        raw.settimeout(_rest(end))
        yield raw


def _rest(end: float) -> float:
    """Seconds left in total: a server that sends single bytes gets no extra time."""
    if (rest := end - time.monotonic()) <= 0:
        raise TimeoutError
    return rest


def _receive(raw: socket.socket, most: int, end: float) -> bytes:
    raw.settimeout(_rest(end))
    if not (received := raw.recv(most)):
        raise ConnectionResetError(0, "it closes the connection")
    return received


def _start_tls(raw: socket.socket, end: float) -> None:
    _reply(raw, "220", end)
    raw.sendall(b"EHLO ops\r\n")
    if "STARTTLS" not in _reply(raw, "250", end).upper():
        raise _NoTls("it offers no STARTTLS", "turn TLS on there (Postfix: smtpd_tls_security_level = may)")
    raw.sendall(b"STARTTLS\r\n")
    _reply(raw, "220", end)


def _reply(raw: socket.socket, code: str, end: float) -> str:
    """Read a reply of SMTP, of one or more lines ("250-", "250 ")."""
    lines = b""
    while not (lines.endswith(b"\n") and lines.splitlines()[-1][3:4] != b"-"):
        lines += _receive(raw, 1, end)  # not a byte more than the reply
        if len(lines) > MOST_LINE_BYTES:
            break
    text = lines.decode("ascii", "replace")
    if not text.startswith(code):
        raise _NoTls(f"it answers “{' '.join(text.split())[:60]}” where SMTP says {code}", NO_TLS)
    return text
