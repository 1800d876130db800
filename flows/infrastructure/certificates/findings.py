"""What is told of certificates: of one, of its files, of what a server shows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from blocks.tls import TlsServer
from runbook.errors import OpsError
from runbook.report import Report
from tasks.certificates.certificate import (
    LEAST_CURVE_BITS,
    LEAST_RSA_BITS,
    OVERDUE,
    OVERDUE_SHARE,
    URGENT,
    URGENT_SHARE,
    Certificate,
)
from tasks.certificates.chain import missing_link
from tasks.certificates.files import CHAIN, Files, file_of
from tasks.certificates.schedules import find_schedules
from tasks.certificates.served import Served
from tasks.certificates.stapling import read_stapled

RENEW = "launch renew-certificates"
COLUMNS = ("where", "names", "issuer", "key", "serial", "valid until", "left")


def judge_files(report: Report, found: Files, authorities: Sequence[Certificate], now: datetime) -> None:
    """A certificate's files: there, whole, each other's, for these names, and for long enough."""
    label = f"{found.name} (file)"
    if not found.chain:
        report.fail(label, found.trouble[1], value=found.trouble[0])
        return
    certificate = found.chain[0]
    why, hint = found.key_trouble
    report.require(f"{label}: private key", not why, hint, value=why or "the certificate's own")
    uncovered = [name for name in found.names if not certificate.covers(name)]
    report.require(
        f"{label}: names",
        not uncovered,
        f"{RENEW}: it asks for them too",
        value=f"it is not for {', '.join(uncovered)}" if uncovered else ", ".join(found.names),
    )
    first = min(found.chain, key=lambda one: one.ends)
    judge_expiry(report, label, certificate if certificate.is_due(now) else first, now)
    _judge_strength(report, label, found.chain)
    if authorities:
        broken = missing_link(found.chain, authorities, now)
        hint = f"put all of them into {CHAIN}, in order, or name the authority in [certificates] authorities"
        report.require(f"{label}: chain", not broken, hint, value=broken or f"whole, {len(found.chain)} certificates")
    if certificate.must_staple:
        report.warn(
            f"{label}: must-staple",
            "issue it anew without --must-staple: Let's Encrypt answers no OCSP any more",
            value="browsers refuse it wherever no OCSP answer is stapled",
        )


def judge_served(report: Report, found: Served, files: Sequence[Files], now: datetime) -> None:
    """What a server shows: believed, for its name, for long enough, and the one of the file."""
    server, certificate = found.server, found.certificate
    if certificate is None:
        report.fail(server.text, found.trouble[1], value=found.trouble[0])
        return
    own = file_of(files, server.name)
    covered = certificate.covers(server.name)
    report.require(
        f"{server.text}: name",
        covered,
        "serve another one there, or correct the name asked for",
        value=server.name if covered else f"shown to {server.name}: {', '.join(certificate.names) or 'none'}",
    )
    judge_expiry(report, server.text, certificate, now)
    _judge_strength(report, server.text, (certificate,))
    report.require(
        f"{server.text}: verified",
        not found.refused,
        _refusal_hint(found, own),
        value=found.refused or f"yes, {found.version}",
    )
    if certificate.must_staple:
        _judge_stapling(report, server)
    if own is not None:
        report.prefer(f"{server.text}: the file's", *same_as_file(certificate, own))


def same_as_file(served: Certificate, files: Files) -> tuple[bool, str]:
    """Whether it is the one in the file; and what to do where not."""
    file = files.chain[0]
    if served.parsed == file.parsed:
        return True, ""
    if served.begins < file.begins:
        return False, "renewed but not reloaded: launch renew-certificates, which has the server read its files again"
    return False, f"the server reads other files than {files.directory}: compare its configuration"


def _refusal_hint(found: Served, own: Files | None) -> str:
    if found.refused.startswith("unable to get local issuer"):
        if own and found.certificate and own.chain[0].parsed == found.certificate.parsed and len(own.chain) > 1:
            return f"serve {own.directory / CHAIN}, not cert.pem: the certificates in between are not sent"
        issuer = found.certificate.issuer if found.certificate else ""
        return f"{issuer} is neither sent nor trusted: serve the whole chain, or name it in [certificates] authorities"
    if "expired" in found.refused:
        return f"{RENEW}, or look which of its chain has expired: openssl s_client -showcerts"
    return "clients refuse it too: serve the whole chain of an authority that they trust, with TLS 1.2 or newer"


def judge_expiry(report: Report, label: str, certificate: Certificate, now: datetime) -> None:
    """30, 14 and 7 days, or the same shares of a life shorter than 90 days."""
    left, name = certificate.left(now), f"{label}: expiry"
    value = f"{in_days(left)} left, until {certificate.ends:%Y-%m-%d %H:%M} UTC ({certificate.subject})"
    if certificate.begins > now:
        report.fail(name, "correct the host's clock, or wait", value=f"valid only from {certificate.begins}")
    elif left < timedelta(0):
        report.fail(name, f"{RENEW} now", value=f"expired at {certificate.ends:%Y-%m-%d %H:%M} UTC")
    elif certificate.within(URGENT, URGENT_SHARE, now):
        report.fail(name, f"{RENEW} now, and find out why nobody did", value=value, expected="over 7 days")
    elif certificate.within(OVERDUE, OVERDUE_SHARE, now):
        hint = f"its renewal is overdue: {RENEW}, and look at its last reports"
        report.warn(name, hint, value=value, expected="over 14 days")
    elif certificate.is_due(now):
        hint = f"its renewal is due: {RENEW}, if its schedule does not"
        report.warn(name, hint, value=value, expected="over 30 days")
    else:
        report.passed(name, value=value, expected="over 30 days")


def in_days(left: timedelta) -> str:
    """For people."""
    return f"{left / timedelta(days=1):.1f} days"


def _judge_strength(report: Report, label: str, chain: Sequence[Certificate]) -> None:
    weak = [f"{one.subject}: {', '.join(one.weaknesses)}" for one in chain if one.weaknesses]
    report.require(
        f"{label}: strength",
        not weak,
        "issue it anew with certbot's own settings (ECDSA, SHA-256)",
        value="; ".join(weak) or chain[0].key,
        expected=f"RSA {LEAST_RSA_BITS}, a curve of {LEAST_CURVE_BITS} bits, SHA-256, or more",
    )


def _judge_stapling(report: Report, server: TlsServer) -> None:
    name = f"{server.text}: must-staple"
    try:
        stapled = read_stapled(server)
    except OpsError as error:
        report.warn(name, error.hint, value=error.message)
        return
    report.require(
        name,
        stapled == "successful",
        "issue it anew without must-staple, or turn stapling on (nginx: ssl_stapling)",
        value=f"stapled: {stapled or 'nothing'}",
    )


def judge_schedules(report: Report) -> None:
    """It is renewed once: here, or there."""
    schedules = find_schedules()
    if schedules.unread:
        report.warn("other schedules", "let the worker's user read them", value=f"not read: {schedules.unread[0]} …")
    report.prefer(
        "renewed by one schedule",
        not schedules.found,
        "turn the others off (systemctl disable certbot.timer; the line in the crontab): they reload nothing "
        "and prove nothing",
        value=", ".join(schedules.found) or "by renew-certificates",
    )


def tell_certificates(report: Report, files: Sequence[Files], served: Sequence[Served], now: datetime) -> None:
    """The table of all."""
    found = [(f"{one.directory / CHAIN}", one.chain[0] if one.chain else None) for one in files]
    found += [(one.server.text, one.certificate) for one in served]
    report.table("Certificates", COLUMNS, [_row(where, certificate, now) for where, certificate in found])


def _row(where: str, certificate: Certificate | None, now: datetime) -> tuple[str, ...]:
    if certificate is None:
        return (where, *("–" for _ in COLUMNS[1:]))
    return (
        where,
        ", ".join(certificate.names),
        certificate.issuer,
        certificate.key,
        certificate.serial_text,
        f"{certificate.ends:%Y-%m-%d %H:%M} UTC",
        in_days(certificate.left(now)),
    )
