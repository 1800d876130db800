"""The certificates (§4.3): in their files, and as they are served."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from prefect import flow

from blocks.environment import Environment
from blocks.places import Certificates
from flows.infrastructure.certificates.findings import judge_files, judge_schedules, judge_served, tell_certificates
from flows.infrastructure.certificates.steps import read_all, read_known
from runbook.report import Report
from runbook.run import runbook
from tasks.certificates.files import Files
from tasks.certificates.served import Served


@flow(name="check-certificates", flow_run_name="check-certificates {environment}")
def check_certificates(environment: str) -> Report:
    """SSL証明書管理: 証明書の有効期限確認 (§4.3)

    Looks at every certificate of `[certificates]`, in its files and as servers show it (TLS, SMTP's STARTTLS,
    PostgreSQL): how long it is valid, for which names, whether its chain is whole and believed, whether the key is its
    own and nobody else's to read, weak keys and signatures, must-staple, and whether the one that is served is the one
    in the file. Run it daily.

    It changes nothing. 30 and 14 days before its end a certificate warns, 7 days before it is critical; one that lives
    for less than 90 days by the same shares of its life. Evidence: the table of all certificates.

    Departs from the manual: `openssl x509 -dates` looks at one file's dates only; a file that was renewed is not yet a
    certificate that is served, and a valid one not yet one that clients believe.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Check certificates", env) as report:
        report.outcome = judge_certificates(report, env.certificates)
    return report


def judge_certificates(report: Report, block: Certificates) -> str:
    """All of them; returns how many there are."""
    now = datetime.now(UTC)
    authorities = read_known(report, block)
    files, served = read_all(block)
    for found in files:
        judge_files(report, found, authorities, now)
    for shown in served:
        judge_served(report, shown, files, now)
    _judge_looked_at(report, files, served)
    judge_schedules(report)
    tell_certificates(report, files, served, now)
    return f"{len(files)} certificates in files, {len(served)} servers"


def _judge_looked_at(report: Report, files: Sequence[Files], served: Sequence[Served]) -> None:
    """Whether somebody is asked for each certificate, and whether there is any."""
    if not files and not served:
        report.warn("certificates", "name domains and served in [certificates]", value="none is named")
    asked = {shown.server.name.lower() for shown in served}
    for found in files:
        names = found.chain[0].covers if found.chain else found.names.__contains__
        report.prefer(
            f"{found.name}: served",
            any(names(name) for name in asked),
            f"add “{found.name}:443” to [certificates] served",
            value="" if any(names(name) for name in asked) else "no server is asked for it",
        )
