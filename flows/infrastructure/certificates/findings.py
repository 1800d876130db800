"""Findings about a certificate's files and about the certificate that a server presents (§4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from blocks.tls import TlsServer
from runbook import clock
from runbook.errors import OpsError
from runbook.next import Next
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

RENEW = Next("renew-certificates")
COLUMNS = ("where", "names", "issuer", "key", "serial", "valid until", "left")


def judge_files(report: Report, found: Files, authorities: Sequence[Certificate], now: datetime) -> None:
    """A certificate's files: readable, complete, a matching key, the right names, not expiring."""
    label = f"{found.name} (file)"
    if not found.chain:
        report.fail(label, found.trouble[1], value=found.trouble[0])
        return
    certificate = found.chain[0]
    why, hint = found.key_trouble
    report.require(f"{label}: private key", not why, hint, value=why or "matches the certificate")
    uncovered = [name for name in found.names if not certificate.covers(name)]
    report.require(
        f"{label}: names",
        not uncovered,
        "renew it, which adds these names",
        value=f"it does not cover {', '.join(uncovered)}" if uncovered else ", ".join(found.names),
        follow=[RENEW],
    )
    first = min(found.chain, key=lambda one: one.ends)
    judge_expiry(report, label, certificate if certificate.is_due(now) else first, now)
    _judge_strength(report, label, found.chain)
    if authorities:
        broken = missing_link(found.chain, authorities, now)
        hint = f"put the complete chain into {CHAIN}, in order, or add the authority to [certificates] authorities"
        report.require(
            f"{label}: chain", not broken, hint, value=broken or f"complete, {len(found.chain)} certificates"
        )
    if certificate.must_staple:
        report.warn(
            f"{label}: must-staple",
            "issue it again without --must-staple: Let's Encrypt no longer offers OCSP",
            value="browsers refuse it without a stapled OCSP response",
        )


def judge_served(report: Report, found: Served, files: Sequence[Files], now: datetime) -> None:
    """The certificate that a server presents: trusted, for its name, not expiring, equal to the file's."""
    server, certificate = found.server, found.certificate
    if certificate is None:
        report.fail(server.text, found.trouble[1], value=found.trouble[0])
        return
    own = file_of(files, server.name)
    covered = certificate.covers(server.name)
    report.require(
        f"{server.text}: name",
        covered,
        "configure another certificate there, or correct the name in [certificates] served",
        value=server.name if covered else f"presented for {server.name}: {', '.join(certificate.names) or 'none'}",
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
        same, hint = same_as_file(certificate, own)
        report.prefer(f"{server.text}: same as the file", same, hint, follow=[RENEW])


def same_as_file(served: Certificate, files: Files) -> tuple[bool, str]:
    """Whether the server presents the file's certificate; else the next step."""
    file = files.chain[0]
    if served.parsed == file.parsed:
        return True, ""
    if served.begins < file.begins:
        return False, "renewed but not reloaded: renew-certificates reloads the server"
    return False, f"check the server's configuration: it reads other files than {files.directory}"


def _refusal_hint(found: Served, own: Files | None) -> str:
    if found.refused.startswith("unable to get local issuer"):
        if own and found.certificate and own.chain[0].parsed == found.certificate.parsed and len(own.chain) > 1:
            return f"serve {own.directory / CHAIN}, not cert.pem: it does not send the intermediate certificates"
        issuer = found.certificate.issuer if found.certificate else ""
        return f"serve the complete chain, or add {issuer} to [certificates] authorities (neither sent nor trusted)"
    if "expired" in found.refused:
        return "run renew-certificates, or find the expired link of the chain: openssl s_client -showcerts"
    return "serve the complete chain of a trusted authority, with TLS 1.2 or newer: clients refuse it too"


def judge_expiry(report: Report, label: str, certificate: Certificate, now: datetime) -> None:
    """30, 14 and 7 days, or the same shares of a lifetime under 90 days."""
    left, name = certificate.left(now), f"{label}: expiry"
    value = f"{in_days(left)} left, until {clock.text(certificate.ends, 'minutes')} ({certificate.subject})"
    if certificate.begins > now:
        report.fail(name, "correct the host's clock, or wait", value=f"valid only from {certificate.begins}")
    elif left < timedelta(0):
        report.fail(name, "renew it now", follow=[RENEW], value=f"expired at {clock.text(certificate.ends, 'minutes')}")
    elif certificate.within(URGENT, URGENT_SHARE, now):
        hint = "renew it now, and find out why its scheduled renewal failed"
        report.fail(name, hint, value=value, expected="over 7 days", follow=[RENEW])
    elif certificate.within(OVERDUE, OVERDUE_SHARE, now):
        hint = "renew it, and check the last reports of renew-certificates: its renewal is overdue"
        report.warn(name, hint, value=value, expected="over 14 days", follow=[RENEW])
    elif certificate.is_due(now):
        hint = "nothing to do if renew-certificates is scheduled; else run it: the renewal is due"
        report.warn(name, hint, value=value, expected="over 30 days", follow=[RENEW])
    else:
        report.passed(name, value=value, expected="over 30 days")


def in_days(left: timedelta) -> str:
    """Days as text."""
    return f"{left / timedelta(days=1):.1f} days"


def _judge_strength(report: Report, label: str, chain: Sequence[Certificate]) -> None:
    weak = [f"{one.subject}: {', '.join(one.weaknesses)}" for one in chain if one.weaknesses]
    report.require(
        f"{label}: strength",
        not weak,
        "issue it again with certbot's defaults (ECDSA, SHA-256)",
        value="; ".join(weak) or chain[0].key,
        expected=f"at least RSA {LEAST_RSA_BITS} or a curve of {LEAST_CURVE_BITS} bits, and SHA-256",
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
        "issue it again without must-staple, or turn stapling on (nginx: ssl_stapling)",
        value=f"stapled: {stapled or 'nothing'}",
    )


def judge_schedules(report: Report) -> None:
    """Whether only one schedule renews the certificates."""
    schedules = find_schedules()
    if schedules.unread:
        report.warn(
            "other schedules", "let the worker's user read them", value=f"not readable: {', '.join(schedules.unread)}"
        )
    report.prefer(
        "renewed by one schedule",
        not schedules.found,
        "disable the others (systemctl disable certbot.timer, the line in the crontab): they reload nothing and prove "
        "nothing",
        value=", ".join(schedules.found) or "renew-certificates",
    )


def attach_certificates(report: Report, files: Sequence[Files], served: Sequence[Served], now: datetime) -> None:
    """The table of all certificates."""
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
        f"{clock.text(certificate.ends, 'minutes')}",
        in_days(certificate.left(now)),
    )
