"""monthly_maintenance: the manual's 20 boxes, each with what was measured, launched or answered; none well unseen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blocks.environment import Environment
from flows.routine.monthly import GROUPS, Sheet, monthly_maintenance
from flows.routine.page import Page
from runbook.language.say import catalogue
from runbook.page.form import Forms
from runbook.report import Report, Status
from tasks.postgres.sessions import statements
from tests.fixtures.application.broken import reported
from tests.fixtures.servers import PostgresServer
from tests.fixtures.workday import NAME, Day, access_line, app_line, finding, rows
from tests.routine.test_weekly import file, vulnerability

# §7.4, word for word.
MANUAL = """
## 1. 依存パッケージ更新
- [ ] Backend依存関係更新（pip update）
- [ ] Frontend依存関係更新（pnpm update）
- [ ] セキュリティ脆弱性スキャン
- [ ] テスト実行・動作確認

## 2. セキュリティ
- [ ] セキュリティパッチ適用
- [ ] アクセスログレビュー
- [ ] 異常なログインパターン確認
- [ ] API使用量の異常検知

## 3. データベース
- [ ] VACUUM実行
- [ ] インデックス使用状況確認
- [ ] スロークエリ分析
- [ ] 統計情報更新

## 4. パフォーマンス
- [ ] レスポンスタイム分析
- [ ] エラーレート確認
- [ ] リソース使用トレンド分析
- [ ] ボトルネック特定

## 5. コスト
- [ ] クラウドリソース使用量確認
- [ ] AIトークン使用量分析
- [ ] 未使用リソース削減
- [ ] コスト最適化施策実施
"""
MORE = """
[ai_providers]
prices_from = "a test"
budget = 10
prices = { "gpt-4o" = [2.0, 8.0] }
"""
ALL = [box for boxes in GROUPS.values() for box in boxes]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "PAUSE_SECONDS", 0.01)


def maintain() -> Report:
    return reported(lambda: monthly_maintenance.fn(NAME))


def boxes(report: Report) -> dict[str, str]:
    """Box → its mark."""
    return {row[2]: row[0] for row in rows(report, "Monthly checklist (§7.4)")}


def login(hours: float, user: str = "u1", result: str = "success", address: str = "10.0.0.1") -> str:
    return app_line(
        "Audit Event",
        hours,
        user_id=user,
        action="login",
        resource=user,
        result=result,
        ip_address=address,
        user_agent="x",
    )


def call(hours: float) -> str:
    return app_line(
        "AI API Call",
        hours,
        provider="azure",
        model="gpt-4o",
        prompt_tokens=500,
        completion_tokens=500,
        total_tokens=1000,
    )


def worked(day: Day, counting: PostgresServer) -> None:
    """A month in which everything was done."""
    day.write(MORE, postgres=counting.port, database="grc_db", web=day.base)
    counting.sql("CREATE TABLE IF NOT EXISTS numbers (n int PRIMARY KEY)", database="grc_db")
    counting.sql("INSERT INTO numbers SELECT generate_series(1, 100) ON CONFLICT DO NOTHING", database="grc_db")
    counting.sql("ANALYZE numbers", database="grc_db")
    (day.logs / "app.log").write_text(
        app_line("began", 24 * 70)
        + "".join(access_line("/api/x", 20, hours=hours) for hours in range(1, 24 * 10, 3))
        + call(0)
    )
    day.log(*[login(24 * n + 5) for n in range(20, 0, -1)], name="audit.log")
    file(day, "Scan vulnerabilities", 5, table=("Vulnerabilities", [vulnerability("LOW")]))
    updated = [("jinja2", "3.0", "3.1", "minor", "backend"), ("react", "19.0", "19.1", "minor", "web")]
    file(day, "Update dependencies", 4, good="backend tests", table=("Updated", updated), branch="dependencies/minor")
    for title in ("Vacuum database", "Review resources", "Monthly maintenance"):
        file(day, title, 30, table=("Figures", [("requests a day", "8.0", "8", "")]))
    answer = [
        ("コスト (§7.4)", "コスト最適化施策実施", "実施", "田中", "2026-11-01", "小さいインスタンスへ", "")
    ]  # an older report
    file(day, "Run checklist", 10, table=("Checklist", answer), checklist="cost_review: 1 of 1")


def test_the_boxes_are_the_manuals() -> None:
    found = dict[str, list[str]]()
    for line in MANUAL.splitlines():
        if group := re.fullmatch(r"## \d\. (.*)", line):
            found[group[1]] = []
        if box := re.fullmatch(r"- \[ \] (.*)", line):
            found[list(found)[-1]].append(box[1])
    said = catalogue("ja").translate
    assert {said(group): [said(box) for box in boxes] for group, boxes in GROUPS.items()} == found
    assert len(ALL) == 20


def test_a_month_in_which_all_was_done(day: Day, counting: PostgresServer) -> None:
    worked(day, counting)
    report = maintain()
    marks = boxes(report)
    assert list(marks) == ALL
    assert report.evidence[0].name == "Monthly checklist (§7.4)", "before all other tables"
    bad = {box: mark for box, mark in marks.items() if mark != "✅"}
    unmeasured, left_out = "Index usage", "Cloud resource usage"
    assert bad == {unmeasured: "⚠️ not measured", left_out: "not applicable"}, (
        "scans are counted since this test's server began"
    )
    assert report.outcome == "18 passed, 0 warnings, 0 critical, 1 not measured, 1 not applicable, of 20 boxes"
    told = {row[2]: row[3] for row in rows(report, "Monthly checklist (§7.4)")}
    assert told["Frontend dependency updates (pnpm update)"].startswith("1 packages updated, on dependencies/minor")
    assert told["Resource usage trends"].startswith("requests a day 8 → 3")
    assert "田中" in finding(report, "Cost measures carried out").value
    assert {"Trends (dashed: full)", "Response time, p95 by day (Asia/Tokyo)"} <= {one.name for one in report.evidence}


def test_where_nothing_was_done_nothing_is_well(day: Day) -> None:
    day.write(postgres=1, redis=1)
    for log in day.logs.iterdir():
        log.unlink()
    report = maintain()
    assert set(boxes(report).values()) == {"⚠️ not measured", "not applicable"}
    assert report.status is Status.WARN
    for mark, _, _, found, hint in rows(report, "Monthly checklist (§7.4)"):
        assert hint or mark == "not applicable", "each says what to launch"
        assert found.startswith("not configured: ") == (mark == "not applicable")


def test_patches_of_a_scan_of_long_ago_are_not_known(day: Day) -> None:
    day.write(postgres=1, redis=1)
    file(day, "Scan vulnerabilities", 40, table=("Vulnerabilities", [vulnerability("LOW")]))
    marks = boxes(maintain())
    assert marks["Security patches"] == "⚠️ not measured"
    assert marks["Vulnerability scan"].startswith("⚠️")


def test_each_box_finds_what_it_is_for(day: Day, counting: PostgresServer) -> None:
    worked(day, counting)
    file(
        day, "Scan vulnerabilities", 1, bad="vulnerabilities, high", table=("Vulnerabilities", [vulnerability("HIGH")])
    )
    file(day, "Update dependencies", 1, bad="web tests", table=("Updated", []))
    file(day, "Vacuum database", 0.5, bad="table x")
    answer = [
        ("Review of costs (§7.4)", "Cost measures carried out", "not carried out", "鈴木", "2026-11-20", "予算なし", "")
    ]
    file(day, "Run checklist", 1, table=("Checklist", answer), checklist="cost_review: 0 of 1")
    counting.sql("CREATE TABLE IF NOT EXISTS unseen AS SELECT generate_series(1, 10) AS n", database="grc_db")
    counting.sql("CREATE INDEX IF NOT EXISTS twice ON numbers (n)", database="grc_db")
    day.log(
        *[access_line("/api/slow", 9000, 500, user="u1")] * 60,
        *[call(0)] * 2000,
        *[access_line("/api/secret", 5, 403, hours=2, user="mallory")] * 90,
    )
    day.log(
        *[login(3 - n / 100, "u2", "failure", "203.0.113.9") for n in range(11)],
        login(2.88, "u2", address="203.0.113.9"),
        name="audit.log",
    )
    try:
        marks = boxes(maintain())
    finally:
        counting.sql("DROP TABLE unseen; DROP INDEX twice", database="grc_db")
    well = {box for box, mark in marks.items() if mark == "✅"}
    assert well == {"Slow queries", "Resource usage trends", "Bottleneck analysis", "Removal of unused resources"}
    critical = {box for box, mark in marks.items() if mark == "🛑"}
    assert critical == {
        "Vulnerability scan",
        "Tests and functional checks",
        "Security patches",
        "Unusual log-in patterns",
        "Error rate check",
        "Response time analysis",
        "AI token usage",
    }


def test_a_user_who_asks_far_more_than_before_is_told(day: Day) -> None:
    for n in range(2, 10):
        day.log(*[access_line("/api/x", 20, hours=24 * n)] * 30, *[access_line("/api/x", 20, hours=24 * n, user="u2")])
    day.log(*[access_line("/api/x", 20, hours=0.1)] * 400, *[access_line("/api/x", 20, hours=0.1, user="u3")] * 30)
    report = maintain()
    found = finding(report, "unusual use of the API")
    assert found.status is Status.WARN
    assert "u1 on " in found.value
    assert "400, far more than on the days before" in found.value
    assert "u3" not in found.value
    assert isinstance(report.path, Path)


def test_a_box_whose_work_sees_nothing_is_no_pass(logs: Path) -> None:
    env = Environment.find(NAME)
    sheet = Sheet(Page(Report("Monthly maintenance", NAME), env, Forms()))
    sheet.fill("a group", "a box", lambda _page: None)
    sheet.fill("a group", "another", lambda _page: "seen")
    assert [row[0] for row in sheet.rows] == ["⚠️ not measured", "✅"]
    assert sheet.told == "1 passed, 0 warnings, 0 critical, 1 not measured, 0 not applicable, of 2 boxes"
