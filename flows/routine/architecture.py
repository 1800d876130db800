"""What an architect looks at once a year (§7.1)."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine import architecture_findings as findings
from flows.routine.evidence import Evidence
from flows.routine.topology import tell_topology
from runbook.report import Report
from runbook.run import runbook


@flow(name="collect-architecture-facts", flow_run_name="collect-architecture-facts {environment}")
def collect_architecture_facts(
    environment: str,
    days: Annotated[int, Field(ge=31, le=3660)] = 365,
    full_months: Annotated[int, Field(ge=1, le=120)] = 12,
) -> Report:
    """アーキテクチャレビュー: 構成・バージョン・容量・障害の事実 (§7.1)

    レビューの場に持って行く事実を1ページにまとめる。構成と実行時の役割、バージョンとサポート終了日、容量の推移、1年間の障害。

    Topology: every node with the role that it has now, Sentinels, services, stores, and who serves users. Versions: of
    servers, languages and the host, with the end of their support by tasks/docker/releases.toml, which names its source
    and day; what is over is critical, half a year before it warns. Capacity: what is there now, how it grew by the
    reports of the last `days`, and which disk is full within `full_months` at that rate. Incidents: reports that were
    CRITICAL, by runbook, and what is CRITICAL still. Run it yearly, before the checklist architecture_review.

    It changes nothing. What does not answer, or is in no table, is told as not measured. Evidence: the tables.

    Args:
        environment: 対象の環境
        days: 障害と容量の推移をさかのぼる日数
        full_months: この月数以内にディスクが埋まる見込みなら警告
    """
    env = Environment.find(environment)
    with runbook("Collect architecture facts", env) as report:
        evidence, since = Evidence(report), report.started - timedelta(days=days)
        nodes = tell_topology(report, evidence, env)
        ended = findings.tell_versions(report, evidence, env)
        findings.tell_capacity(report, evidence, env, since, full_months)
        incidents = findings.tell_incidents(report, env, since)
        evidence.tell_missing()
        report.outcome = f"{nodes} nodes and services, {ended} without support, {incidents} incidents in {days} days"
    return report
