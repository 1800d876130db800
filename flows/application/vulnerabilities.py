"""Known vulnerabilities in the application's packages and images (§3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from blocks.environment import Environment
from flows.application.branch import save_evidence
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.kinds import Pending
from runbook.next import Next
from runbook.page import render
from runbook.report import Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.dependencies.advisory import Advisory, Scan, merged
from tasks.dependencies.image_scan import scan_image
from tasks.dependencies.node_audit import audit_node, tools_of
from tasks.dependencies.python_audit import audit_python
from tasks.dependencies.severity import Severity
from tasks.reports.past import filed

Part = Literal["python", "node", "images"]
ALL: tuple[Part, ...] = ("python", "node", "images")


@flow(name="scan-vulnerabilities", flow_run_name=RunName("scan-vulnerabilities {environment} {parts}"))
def scan_vulnerabilities(
    environment: str,
    only_production: bool = False,
    seconds: Annotated[int, Field(ge=30, le=7200)] = 600,
    parts: tuple[Part, ...] = ALL,
    since_days: Annotated[int, Field(ge=0, le=366)] = 0,
) -> Report:
    """セキュリティパッチ適用: 脆弱性スキャン (§3.2)

    Runs pip-audit on the backend's environment, pnpm audit or npm audit on the web application, and trivy or grype on
    the images. One table lists all vulnerabilities by severity, with the fixed version, and whether each is new since
    the last report. A vulnerability (CVE, GHSA, PYSEC) that two scanners find is one row. Run it weekly (§7.3) for the
    packages, monthly for everything.

    It changes nothing. High and critical vulnerabilities are CRITICAL, as in the manual. Others, and those without a
    severity in their advisory, are WARN. A scan without an answer is “not known”, never clean. Evidence: the JSON of
    each scanner. Next for a critical one: patch-vulnerability.

    Departs from the manual: Docker no longer has `docker scan`. `pip-audit | grep high` never matches: pip-audit prints
    no severity, so it is read from the advisory.

    Args:
        environment: Environment (lab, staging, production …)
        only_production: On: leave out the web application's development packages (devDependencies)
        seconds: Longest wait for each tool, in seconds
        parts: Parts (Python packages, Node packages, Docker images)
        since_days: A finding is new if it is not in a report at least this many days old. 0: compare with the last
            report
    """
    env = Environment.find(environment)
    with runbook("Scan vulnerabilities", env) as report:
        if not parts:
            raise OpsError("nothing is chosen", "choose python, node or images in parts")
        scans = [scan for scan in _scans(report, env, parts, only_production, seconds) if scan]
        for number, scan in enumerate(scans, 1):
            save_evidence(report, env, f"{number}-{scan.tool}-{scan.place}"[:80] + ".json", scan.raw)
        found = merged(advisory for scan in scans for advisory in scan.found)
        new = mark_new(report, env, scans, found, since_days)
        judge_scans(report, scans, found, new)
        worst = found[0].severity.name if found else ""
        report.outcome = f"{len(found)} vulnerabilities are known" + (f", the worst {worst}" if worst else "")
        if not scans:
            report.outcome = "not known: no scanner answered"
    return report


def _scans(
    report: Report, env: Environment, parts: Sequence[Part], only_production: bool, seconds: float
) -> list[Scan | None]:
    """All scans, concurrently; None for one without an answer, which is a WARN."""
    application, pending = env.application, dict[str, Pending[Scan]]()
    if left := [part for part in ALL if part not in parts]:
        report.fact("not chosen", ", ".join(left))
    if "python" in parts:
        pending["Python packages"] = audit_python.submit(application, seconds)
    if "node" in parts and application.web_directory:
        web = Path(application.web_directory)
        try:
            for tool in tools_of(web):
                pending[f"node packages ({tool})"] = audit_node.submit(web, tool, only_production, seconds)
        except OpsError as error:
            judge_unanswered(report, "node packages", error)
    elif "node" in parts:
        report.fact("web application", "not scanned: the environment names no web_directory")
    for image in application.images if "images" in parts else ():
        pending[f"image {image}"] = scan_image.submit(image, seconds)
    if "images" in parts and not application.images:
        report.fact("images", "not scanned: the environment names none")
    return [_answer(report, what, scan) for what, scan in pending.items()]


def _answer(report: Report, what: str, scan: Pending[Scan]) -> Scan | None:
    try:
        return scan.result()
    except OpsError as error:
        judge_unanswered(report, what, error)
        return None


TABLE = "Vulnerabilities"
COLUMNS = ("severity", "package", "installed", "id", "also", "fixed in", "new", "where", "what")
ANSWERED = "scans that answered"
MOST_REPORTS = 50
MOST_TEXT = 160
PATCH = Next("patch-vulnerability", "fix it on a hotfix branch")
UPDATE = Next("update-dependencies", "update packages on a branch")
JUDGED = {
    Severity.CRITICAL: (Status.CRITICAL, "patch it now with its id, and deploy the branch"),
    Severity.HIGH: (Status.CRITICAL, "patch it with its id, and deploy the branch"),
    Severity.MODERATE: (Status.WARN, "install the fix with the next update of the dependencies"),
    Severity.LOW: (Status.WARN, "install the fix with the next update of the dependencies"),
    Severity.UNKNOWN: (Status.WARN, "read the advisory, which states no severity; until then treat it as high"),
}


def judge_unanswered(report: Report, what: str, error: OpsError) -> None:
    """A scan without an answer is a WARN: the vulnerabilities there are not known."""
    report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")


def judge_scans(report: Report, scans: Sequence[Scan], found: Sequence[Advisory], new: Sequence[bool]) -> None:
    """The table, one finding for each severity, and the packages that the scanners skipped."""
    for scan in scans:
        report.prefer(
            f"{scan.tool}: {scan.place}",
            bool(scan.checked),
            "the scanner checked no package: check the configured place",
            value=f"{scan.checked:,} checked, {len(scan.found):,} known vulnerabilities",
        )
        if scan.gaps:
            report.warn(
                f"skipped by {scan.tool}",
                "check these packages by hand: a skipped package is not known to be clean",
                value=f"{len(scan.gaps)}: {'; '.join(scan.gaps[:3])}",
            )
    report.table(TABLE, COLUMNS, [_row(one, is_new) for one, is_new in zip(found, new, strict=True)])
    for severity, (status, hint) in JUDGED.items():
        if names := [f"{one.package} {one.name}" for one in found if one.severity is severity]:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            report.fail(
                f"vulnerabilities, {severity.name.lower()}",
                hint,
                expected="none",
                value=f"{len(names)}: {', '.join(names[:5])}{more}",
                worst=status,
                follow=[PATCH if status is Status.CRITICAL else UPDATE],
            )


def mark_new(
    report: Report, env: Environment, scans: Sequence[Scan], found: Sequence[Advisory], since_days: int = 0
) -> list[bool]:
    """Which of them are new since the last report, at least `since_days` old, in which all of these scans answered."""
    answered = sorted({f"{scan.tool}: {scan.place}" for scan in scans})
    report.fact(ANSWERED, "; ".join(answered))
    latest = report.started - timedelta(days=since_days)
    began, before = _last(env, render.key(report), set(answered), latest)
    if not began:
        old = f", {since_days} days old or older" if since_days else ""
        report.fact("new", f"not known: there is no earlier report of these scans{old}")
        return [False] * len(found)
    new = [not (before & {one.upper() for one in advisory.ids}) for advisory in found]
    report.fact("new", f"{sum(new)} since the report of {began}")
    return new


def _last(env: Environment, key: str, answered: set[str], latest: datetime) -> tuple[str, set[str]]:
    """The start of that report, and every id in it; "" if there is none."""
    found = (one for one in filed(env.reports_directory, env.name, key) if one.started <= latest)
    for one in islice(found, MOST_REPORTS):
        whole = any(item["name"] == TABLE for item in one.content["evidence"])  # not a run that ended early
        if whole and answered <= set(one.facts.get(ANSWERED, "").split("; ")):
            ids = {id_.upper() for row in one.rows(TABLE) for cell in row[3:5] for id_ in cell.split(", ") if id_}
            return str(one.content["started"])[:16].replace("T", " "), ids
    return "", set()


def _row(one: Advisory, is_new: bool) -> tuple[str, ...]:
    others = ", ".join(other for other in one.ids if other != one.name)
    fixed = " or ".join(one.fixed) or "no version yet"
    summary = one.summary if len(one.summary) <= MOST_TEXT else one.summary[: MOST_TEXT - 1] + "…"
    return (
        one.severity.name,
        one.package,
        ", ".join(one.versions),
        one.name,
        others,
        fixed,
        "new" if is_new else "",
        ", ".join(one.places),
        summary,
    )
