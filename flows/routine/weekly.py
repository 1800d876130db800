"""The weekly check (§7.3)."""

from __future__ import annotations

from prefect import flow

from blocks.environment import Environment
from flows.infrastructure.certificates import judge_certificates
from flows.routine.steps import Page
from flows.routine.weekly_findings import judge_alerts, judge_docker, judge_sizes, judge_verifications
from runbook.report import Report
from runbook.run import runbook


@flow(name="weekly-check", flow_run_name="weekly-check {environment}")
def weekly_check(environment: str) -> Report:
    """週次保守チェック: リストアテスト・セキュリティアラート・未使用Dockerリソース・ログサイズ・証明書 (§7.3)

    The manual's five on one page: whether a backup of each kind was restored and compared this week, and how that ended
    (the last reports of verify-backup); high and critical vulnerabilities (the last report of scan-vulnerabilities);
    what nobody uses on the Docker Engine; the size of each log and how long its disk lasts; every certificate, in its
    file and as it is served. Run it weekly, behind verify-backup and scan-vulnerabilities.

    It changes nothing, and restores nothing twice. What was never done, failed, or is older than 8 days is a finding
    with the runbook to launch; what has no source is told as not measured, never as well.

    Departs from the manual: `pg_restore --list` reads the table of contents only, and passes a flipped byte in the
    data; `pip-audit` prints no severity that grep could find; `openssl x509` reads a file that may not be the one
    that is served.

    Args:
        environment: 対象の環境
    """
    env = Environment.find(environment)
    with runbook("Weekly check", env) as report:
        page = Page.of(report, env)
        judge_verifications(page)
        judge_alerts(page)
        judge_docker(page)
        judge_sizes(page)
        if page.names("certificates"):
            told = page.part("certificates", lambda: judge_certificates(report, env.certificates))
            report.fact("certificates", told or "not measured")
        bad = sum(finding.hint != "" for finding in report.findings)
        report.outcome = f"{len(report.findings)} checks, {bad} to look at" if bad else "all is well"
    return report
