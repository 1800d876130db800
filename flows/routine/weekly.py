"""The weekly check (§7.3)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

from blocks.environment import Environment
from flows.infrastructure.certificates.check import judge_certificates
from flows.infrastructure.images.usage import judge_leftovers
from flows.logs.check import judge_disk
from flows.recovery.objectives.points import resources_of
from flows.routine.page import Page
from flows.routine.sources.past import AHEAD, WEEKLY, done, is_ahead, judge_last, link, told
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import duration, size
from tasks.backups.catalogue import PREFIX
from tasks.backups.manifest import Kind
from tasks.dependencies.severity import Severity
from tasks.docker.inventory import read_inventory
from tasks.logs.reading.files import find_logs
from tasks.recovery_points.backups import KINDS
from tasks.recovery_points.point import Resource
from tasks.reports.past import FiledReport


@flow(name="weekly-check", flow_run_name=RunName("weekly-check {environment}"))
def weekly_check(environment: str) -> Report:
    """週次保守チェック: リストアテスト・セキュリティアラート・未使用Dockerリソース・ログサイズ・証明書 (§7.3)

    The manual's five checks on one page: this week's verification of a backup of each kind (reports of verify-backup);
    high and critical vulnerabilities (report of scan-vulnerabilities); unused resources of the Docker Engine; the size
    of each log and how long its disk space lasts; every certificate, in its file and as served. Run it weekly, after
    verify-backup and scan-vulnerabilities.

    It changes nothing, and repeats no restore. A verification or scan that is missing, failed or older than 8 days is a
    finding with the runbook to launch. A value without a source is "not measured", never OK.

    Departs from the manual: `pg_restore --list` reads the table of contents only, and misses a flipped byte in the
    data; `pip-audit` prints no severity for grep to find; `openssl x509` may read another file than the served one.

    Args:
        environment: Environment (lab, staging, production …)
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
        report.outcome = f"{len(report.findings)} checks, {bad} findings" if bad else "all checks passed"
    return report


VERIFY, SCAN = "verify-backup", "scan-vulnerabilities"
LOUD = (Severity.CRITICAL.name, Severity.HIGH.name)


def judge_verifications(page: Page) -> None:
    """For each kind of backup: the last verification by a real restore."""
    if not page.names("backups"):
        return
    resources = [one for one in get_args(Resource) if one in resources_of(page.env)]
    kinds: list[Kind] = [KINDS[one] for one in resources]
    kinds += ["cluster"] if page.env.has("wal") else []
    kinds += ["prefect"] if page.env.has("backups.prefect") else []
    if not kinds:
        page.not_measured("restores", "the environment has no resource to back up", "add [postgres], [redis] …")
    reports = list(done(page, VERIFY)) if kinds else []
    for kind in kinds:
        _judge_verification(page, kind, next((one for one in reports if _is_of(one, kind)), None))
    if lost := next((one for one in reports[:1] if not {"kind", "backup"} & one.facts.keys()), None):
        page.report.fail(
            "the last verify-backup", "take a backup: the last verify-backup found none to restore", value=told(lost)
        )


def _is_of(one: FiledReport, kind: Kind) -> bool:
    """Whether a report of verify-backup is about this kind of backup."""
    return one.facts.get("kind") == kind or one.facts.get("backup", "").startswith(f"{PREFIX[kind]}_")


def _judge_verification(page: Page, kind: Kind, found: FiledReport | None) -> None:
    name, launch = f"restore of a {kind} backup", page.launch(VERIFY, kind=kind)
    if found is None:
        page.not_measured(
            name, "no backup of this kind was ever verified", f"{launch} restores a staged copy and compares it"
        )
        return
    link(page, f"{VERIFY} of {kind}", found)
    age = datetime.now(UTC) - found.started
    failed, late, ahead = found.status == Status.CRITICAL.value, age > WEEKLY, is_ahead(found.started)
    hint = f"take another backup, then {launch}" if failed else AHEAD if ahead else f"{launch}, and check its schedule"
    value = f"{told(found)} ({'in the future' if ahead else f'{duration(age.total_seconds())} ago'})"
    page.report.require(
        name,
        not failed and not late and not ahead,
        hint,
        value=value,
        expected=f"within {WEEKLY.days} days",
        worst=Status.CRITICAL if failed else Status.WARN,
    )


def judge_alerts(page: Page, within: timedelta = WEEKLY) -> str | None:
    """High and critical vulnerabilities of the last scan, and scanners without an answer. None: nothing to scan, or no
    scan."""
    if not can_scan(page):
        return None
    hint = f"{page.launch('patch-vulnerability')} for each of them"
    found = judge_last(page, "vulnerability scan", SCAN, within, grave=True, next_hint=hint)
    if found is None:
        return None
    silent = [one for one in found.findings if one["value"].startswith("not known")]
    for one in silent:
        page.not_measured(f"scan of {one['name']}", one["value"], one["hint"])
    rows = found.rows("Vulnerabilities")
    loud = [row for row in rows if row and row[0] in LOUD]
    if silent and not loud:
        page.not_measured(
            "high and critical vulnerabilities", f"{len(silent)} scanners did not answer", "fix the findings about them"
        )
        return None
    new = sum(len(row) > 6 and row[6] == "new" for row in loud)
    names = ", ".join(f"{row[1]} {row[3]}" for row in loud[:5] if len(row) > 3)
    value = f"{len(loud)}, {new} of them new: {names}" if loud else f"none of {len(rows)}"
    page.report.require("high and critical vulnerabilities", not loud, hint, expected="none", value=value)
    return value


def can_scan(page: Page) -> bool:
    """Whether the application has anything that scan-vulnerabilities scans."""
    scanned = ("application.python", "application.web_directory", "application.images")
    return any(map(page.env.has, scanned)) or page.names("application")


def judge_docker(page: Page) -> None:
    """Unused resources of the Docker Engine; if it does not answer, the last report of check-docker-usage."""
    if not page.names("docker"):
        return
    try:
        found = read_inventory(page.env.docker.host)
    except OpsError as error:
        page.not_measured("unused Docker resources", error.message, error.hint)
        judge_last(page, "last check of Docker", "check-docker-usage", WEEKLY)
        return
    judge_leftovers(page.report, found, page.env.docker)
    page.report.fact("Docker", f"layers use {size(found.layers_bytes)}; {page.launch('clean-docker')}")


def judge_sizes(page: Page) -> None:
    """The size of every log with its rotated files, and how long the disk space lasts."""
    if not page.names("logs"):
        return
    rows, total = [], 0
    logs = page.env.logs
    for log in filter(None, (logs.app, logs.audit, logs.backup)):
        files = page.part(f"size of {Path(log).name}", lambda log=log: find_logs(Path(log)))  # type: ignore[misc]
        for file in files or ():
            rows.append((file.path, size(file.bytes), f"{file.modified.astimezone(page.env.zone):%Y-%m-%d %H:%M}"))
            total += file.bytes
    page.report.table("Logs", ("file", "size", f"last written ({page.env.zone.key})"), rows)
    page.report.fact("logs", f"{size(total)} in {len(rows)} files; {page.launch('clean-logs')}")
    if rows:
        page.part("disk of the logs", lambda: judge_disk(page.report, page.env))
