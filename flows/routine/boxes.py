"""The manual's monthly checklist (§7.4): its boxes, word for word, and how one is filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flows.routine.steps import NOT_MEASURED, Page
from runbook.render import MARK
from runbook.report import NOT_CONFIGURED, Status

GROUPS: Mapping[str, tuple[str, ...]] = {
    "依存パッケージ更新": (
        "Backend依存関係更新（pip update）",
        "Frontend依存関係更新（pnpm update）",
        "セキュリティ脆弱性スキャン",
        "テスト実行・動作確認",
    ),
    "セキュリティ": (
        "セキュリティパッチ適用",
        "アクセスログレビュー",
        "異常なログインパターン確認",
        "API使用量の異常検知",
    ),
    "データベース": ("VACUUM実行", "インデックス使用状況確認", "スロークエリ分析", "統計情報更新"),
    "パフォーマンス": (
        "レスポンスタイム分析",
        "エラーレート確認",
        "リソース使用トレンド分析",
        "ボトルネック特定",
    ),
    "コスト": (
        "クラウドリソース使用量確認",
        "AIトークン使用量分析",
        "未使用リソース削減",
        "コスト最適化施策実施",
    ),
}
TABLE = "月次保守チェックリスト"
COLUMNS = ("", "グループ", "項目", "結果", "次の一手")
UNMEASURED, NOT_APPLICABLE = "未計測", "対象外"
Work = Callable[[Page], str | None]


@dataclass
class Sheet:
    """The boxes of one month, filled in one after the other. A box is as bad as the worst that its work found."""

    page: Page
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    worst: list[Status] = field(default_factory=list)
    left_out: int = 0

    def fill(self, group: str, box: str, work: Work) -> None:
        """`work` adds findings of its own, and returns in a sentence what it saw; where it cannot read its source, or
        finds nothing at all, that is told and is no pass. A box of a part that the environment lacks is 対象外."""
        report = self.page.report
        before, self.page.left_out[:] = len(report.findings), []
        told = self.page.part(box, lambda: work(self.page))
        if len(report.findings) == before and not told and self.page.left_out:
            parts = ", ".join(dict.fromkeys(self.page.left_out))
            self.left_out += 1
            self.rows.append((NOT_APPLICABLE, group, box, f"{NOT_CONFIGURED}: {parts}", ""))
            return
        if len(report.findings) == before and not told:
            self.page.not_measured(box, "it has no source here", "see the report's other findings")
        if len(report.findings) == before:
            report.expect(box, True, "", value=told)
        found = report.findings[before:]
        bad = max(found, key=lambda one: list(Status).index(one.status))
        unmeasured = bad.status is not Status.OK and all(
            one.value.startswith(NOT_MEASURED) for one in found if one.status is bad.status
        )
        self.worst.append(bad.status)
        mark = f"{MARK[bad.status]} {UNMEASURED}" if unmeasured else MARK[bad.status]
        seen = told or "" if bad.status is Status.OK else f"{bad.name}: {bad.value}"
        said = "; ".join(dict.fromkeys(text for text in (seen, told or "") if text)) or bad.value
        self.rows.append((mark, group, box, said, bad.hint))

    def attach(self) -> None:
        """The table, before everything else on the page."""
        report = self.page.report
        report.table(TABLE, COLUMNS, self.rows)
        report.evidence.insert(0, report.evidence.pop())

    @property
    def told(self) -> str:
        """How many of each."""
        unmeasured = sum(row[0].endswith(UNMEASURED) for row in self.rows)
        well = self.worst.count(Status.OK)
        critical = self.worst.count(Status.CRITICAL)
        rest = len(self.rows) - well - critical - unmeasured - self.left_out
        left_out = f", {self.left_out} {NOT_APPLICABLE}" if self.left_out else ""
        told = f"{well} well, {rest} to look at, {critical} critical, {unmeasured} {UNMEASURED}{left_out}"
        return f"{told}, of {len(self.rows)}"
