"""The monthly maintenance (§7.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.routine import access_findings as access
from flows.routine import cost_findings as costs
from flows.routine import monthly_upkeep as upkeep
from flows.routine import performance_findings as performance
from flows.routine.boxes import GROUPS, Sheet, Work
from flows.routine.figures import read_figures
from flows.routine.past import done, is_ahead, link
from flows.routine.savings import judge_savings
from flows.routine.steps import Page
from flows.routine.traffic import Traffic, read_traffic
from flows.routine.trends import judge_trends
from runbook.report import Report, Status
from runbook.run import runbook
from tasks.postgres.statements import Statements, read_statements, sample_waits

CHECKLIST = "run-checklist"
QUARTER_DAYS = 100


@flow(name="monthly-maintenance", flow_run_name="monthly-maintenance {environment}")
def monthly_maintenance(environment: str, days: Annotated[int, Field(ge=1, le=366)] = 31) -> Report:
    """月次保守チェックリスト: 依存パッケージ・セキュリティ・データベース・パフォーマンス・コスト (§7.4)

    All 20 boxes of the manual, in its five groups, each with its measurement of now, the last report of the runbook
    that does it (with date, status and path), or the answer of a person to the checklist; below them the tables they
    are from, and figures over the past months as pictures. Run it monthly, behind update-dependencies,
    scan-vulnerabilities, vacuum-database and review-resources.

    It changes nothing: each box says what to launch next. What has no source is 「未計測」 (not measured), never OK.

    Args:
        environment: 対象の環境
        days: アクセスログ・監査ログの対象日数
    """
    env = Environment.find(environment)
    with runbook("Monthly maintenance", env) as report:
        page = Page.of(report, env)
        sheet, works = Sheet(page), works_of(page, days)
        for group, boxes in GROUPS.items():
            for box in boxes:
                sheet.fill(group, box, works[box])
        sheet.attach()
        report.outcome = sheet.told
    return report


@dataclass
class Seen:
    """What one box reads and another needs too."""

    traffic: Traffic | None
    statements: Statements | None = None

    def slow(self, page: Page) -> str | None:
        """Statements by the time that they took."""
        if not page.names("postgres"):
            return None
        self.statements = read_statements(page.env.postgres)
        return performance.judge_statements(page, self.statements)

    def bottlenecks(self, page: Page) -> str:
        """Where the time goes."""
        has = page.env.has("postgres")
        waits = page.part("waits", lambda: sample_waits(page.env.postgres)) if has else None
        return performance.judge_bottlenecks(page, self.traffic, self.statements, waits)


def works_of(page: Page, days: int) -> Mapping[str, Work]:
    """What fills each box. What several need is read once."""
    traffic = read_traffic(page, days)
    seen = Seen(traffic)
    return {
        "Backend依存関係更新（pip update）": upkeep.backend_packages,
        "Frontend依存関係更新（pnpm update）": upkeep.frontend_packages,
        "セキュリティ脆弱性スキャン": upkeep.scan,
        "テスト実行・動作確認": upkeep.tests,
        "セキュリティパッチ適用": upkeep.patches,
        "アクセスログレビュー": _of(traffic, access.judge_access),
        "異常なログインパターン確認": lambda page: access.judge_log_ins(page, days),
        "API使用量の異常検知": _of(traffic, access.judge_api_use),
        "VACUUM実行": upkeep.vacuum,
        "インデックス使用状況確認": upkeep.indexes,
        "スロークエリ分析": seen.slow,
        "統計情報更新": upkeep.statistics,
        "レスポンスタイム分析": _of(traffic, _response),
        "エラーレート確認": _of(traffic, performance.judge_error_rate),
        "リソース使用トレンド分析": lambda page: judge_trends(page, read_figures(page, traffic)),
        "ボトルネック特定": seen.bottlenecks,
        "クラウドリソース使用量確認": _resources,
        "AIトークン使用量分析": costs.judge_tokens,
        "未使用リソース削減": judge_savings,
        "コスト最適化施策実施": partial(answered, box="コスト最適化施策実施"),
    }


def _of(traffic: Traffic | None, judge: Callable[[Page, Traffic], str]) -> Work:
    """Where no request could be read, the box says so."""

    def work(page: Page) -> str | None:
        if traffic is None:
            if not page.names("logs"):
                return None
            page.not_measured("requests", "no access line could be counted", "see what is said of the log above")
            return None
        return judge(page, traffic)

    return work


def _response(page: Page, traffic: Traffic) -> str:
    performance.tell_paths(page, traffic)
    performance.tell_days(page, traffic)
    return performance.judge_response(page, traffic)


def _resources(page: Page) -> str | None:
    bill = costs.judge_resources(page)
    return "; ".join(f"{month}: {amount:,.2f}" for month, amount in bill.items()) or None


def answered(page: Page, *, box: str) -> str | None:
    """What a person answered to a box of a checklist last."""
    for found in done(page, CHECKLIST):
        row = next((row for row in found.rows("Checklist") if len(row) > 5 and row[1] == box), None)
        if row is None:
            continue
        link(page, CHECKLIST, found)
        fresh = not is_ahead(found.finished) and (datetime.now(UTC) - found.finished).days <= QUARTER_DAYS
        page.report.expect(box, row[2] == "実施" and fresh, page.launch(CHECKLIST, checklist="cost_review"),
                           value=f"{row[2]} ({row[3]}, {row[4]}) {row[5]}".strip(), otherwise=Status.WARN,
                           expected=f"実施, within {QUARTER_DAYS} days")  # fmt: skip
        return f"{row[2]}: {row[3]}"
    page.not_measured(box, "only a person can tell, and nobody has answered", page.launch(CHECKLIST,
                      checklist="cost_review") + " asks for it")  # fmt: skip
    return None
