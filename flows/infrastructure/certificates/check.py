"""Check the TLS certificates: in their files, and as servers present them (§4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from blocks.environment import Environment
from blocks.places import Certificates
from flows.infrastructure.certificates.findings import attach_certificates, judge_files, judge_schedules, judge_served
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.certificates.certificate import Certificate
from tasks.certificates.chain import read_authorities
from tasks.certificates.files import Files, read_files
from tasks.certificates.served import Served, read_served


@flow(name="check-certificates", flow_run_name=RunName("check-certificates {environment}"))
def check_certificates(environment: str) -> Report:
    """SSL証明書管理: 証明書の有効期限確認 (§4.3)

    Checks every certificate of `[certificates]`, in its files and as servers present it (TLS, SMTP's STARTTLS,
    PostgreSQL): expiry, names, a complete and trusted chain, the matching private key and its permissions, weak keys
    and signatures, must-staple, and whether the server presents the certificate of the file. Run it daily.

    It changes nothing. A certificate is WARN 30 and 14 days before its expiry, and CRITICAL 7 days before; one with a
    lifetime under 90 days at the same shares of its lifetime. Evidence: the table of all certificates.

    Departs from the manual: `openssl x509 -dates` reads only the dates of one file. A renewed file is not yet served,
    and a valid certificate is not always trusted by clients.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Check certificates", env) as report:
        report.outcome = judge_certificates(report, env.certificates)
    return report


def judge_certificates(report: Report, block: Certificates) -> str:
    """Judge all certificates; returns their number."""
    now = datetime.now(UTC)
    authorities = read_known(report, block)
    files, served = read_all(block)
    for found in files:
        judge_files(report, found, authorities, now)
    for shown in served:
        judge_served(report, shown, files, now)
    _judge_coverage(report, files, served)
    judge_schedules(report)
    attach_certificates(report, files, served, now)
    return f"{len(files)} certificates in files, {len(served)} servers"


def _judge_coverage(report: Report, files: Sequence[Files], served: Sequence[Served]) -> None:
    """Whether a configured server presents each certificate, and whether any is configured."""
    if not files and not served:
        report.warn("certificates", "add domains and served to [certificates]", value="none is configured")
    queried = {shown.server.name.lower() for shown in served}
    for found in files:
        names = found.chain[0].covers if found.chain else found.names.__contains__
        report.prefer(
            f"{found.name}: served",
            any(names(name) for name in queried),
            f"add “{found.name}:443” to [certificates] served",
            value="" if any(names(name) for name in queried) else "no configured server presents it",
        )


def read_all(block: Certificates) -> tuple[list[Files], list[Served]]:
    """All files, and all servers concurrently: a server that hangs does not delay the others."""
    files = [read_files(Path(block.directory), names) for names in block.lineages()]
    pending = [read_served.submit(server, block.authorities) for server in block.servers()]
    return files, [one.result() for one in pending]


def read_known(report: Report, block: Certificates) -> Sequence[Certificate]:
    """The trusted authorities; none, with a finding, if they cannot be read."""
    try:
        return read_authorities(block.authorities)
    except OpsError as error:
        report.fail("authorities", error.hint, value=f"{error.message}: no chain could be verified")
        return ()
