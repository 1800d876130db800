"""What is known to be vulnerable in what the application is made of (§3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.application.kept import keep
from flows.application.vulnerability_findings import judge_scans, judge_unanswered, tell_new
from runbook.errors import OpsError
from runbook.kinds import Pending
from runbook.report import Report
from runbook.run import runbook
from tasks.dependencies.advisory import Scan, merged
from tasks.dependencies.image_scan import scan_image
from tasks.dependencies.node_audit import audit_node, tools_of
from tasks.dependencies.python_audit import audit_python

Part = Literal["python", "node", "images"]
ALL: tuple[Part, ...] = ("python", "node", "images")


@flow(name="scan-vulnerabilities", flow_run_name="scan-vulnerabilities {environment}")
def scan_vulnerabilities(
    environment: str,
    only_production: bool = False,
    seconds: Annotated[int, Field(ge=30, le=7200)] = 600,
    parts: tuple[Part, ...] = ALL,
    since_days: Annotated[int, Field(ge=0, le=366)] = 0,
) -> Report:
    """セキュリティパッチ適用: 脆弱性スキャン (§3.2)

    Asks pip-audit for the backend's environment, pnpm audit or npm audit for the web application, and trivy or grype
    for the images, and joins their answers into one table by severity: the same vulnerability (CVE, GHSA, PYSEC) found
    by two of them is one row, with what fixes it, and whether it is new since the last report. Run it weekly (§7.3) of
    the packages, monthly of everything.

    It changes nothing. High and critical ones are CRITICAL, as the manual looks for both; others, and those whose
    severity no advisory tells, warn. What gave no answer is told as not known, and never as clean. Evidence: each
    tool's own JSON. Next for a critical one: patch-vulnerability.

    Departs from the manual: `docker scan` is gone from Docker; `pip-audit | grep high` never matches, since pip-audit
    prints no severity: it is taken from the advisory.

    Args:
        environment: 対象の環境
        only_production: trueならWebアプリケーションの開発用パッケージ (devDependencies) を除く
        seconds: 各ツールを待つ秒数の上限
        parts: 対象 (Pythonパッケージ、Nodeパッケージ、Dockerイメージ)
        since_days: この日数以上前のレポートと比べて「新規」を判定する。0なら直前のレポート
    """
    env = Environment.find(environment)
    with runbook("Scan vulnerabilities", env) as report:
        if not parts:
            raise OpsError("nothing is chosen", "choose python, node or images in parts")
        scans = [scan for scan in _scans(report, env, parts, only_production, seconds) if scan]
        for number, scan in enumerate(scans, 1):
            keep(report, env, f"{number}-{scan.tool}-{scan.place}"[:80] + ".json", scan.raw)
        found = merged(advisory for scan in scans for advisory in scan.found)
        new = tell_new(report, env, scans, found, since_days)
        judge_scans(report, scans, found, new)
        worst = found[0].severity.name if found else ""
        report.outcome = f"{len(found)} vulnerabilities are known" + (f", the worst {worst}" if worst else "")
        if not scans:
            report.outcome = "nothing is known: no scanner answered"
    return report


def _scans(
    report: Report, env: Environment, parts: Sequence[Part], only_production: bool, seconds: float
) -> list[Scan | None]:
    """All of them beside each other; None for one that gave no answer, which is told."""
    application, pending = env.application, dict[str, Pending[Scan]]()
    if left := [part for part in ALL if part not in parts]:
        report.fact("not asked for", ", ".join(left))
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
