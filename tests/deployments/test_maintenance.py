"""The maintenance table: the manual's rows against the data, the data against prefect.yaml, both against the page."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from prefect.server.schemas.schedules import CronSchedule

from deployments import maintenance
from deployments.maintenance import MaintenanceRow, crons_of, duration_tag, entries, read_table, seconds_of, told

ROOT = Path(__file__).resolve().parents[2]
MANUAL = """
| **日次** | ヘルスチェック確認 | SRE | 5分 | 高 |
| 日次 | エラーログ確認 | SRE | 15分 | 高 |
| 日次 | バックアップ実行確認 | SRE | 5分 | 高 |
| 日次 | リソース使用量確認 | SRE | 10分 | 中 |
| **週次** | バックアップリストアテスト | DBA | 30分 | 高 |
| 週次 | セキュリティアラート確認 | セキュリティ | 20分 | 高 |
| 週次 | ログローテーション確認 | SRE | 10分 | 中 |
| 週次 | 未使用リソース削除 | DevOps | 15分 | 低 |
| **月次** | 依存パッケージ更新 | 開発者 | 2時間 | 高 |
| 月次 | セキュリティスキャン | セキュリティ | 1時間 | 高 |
| 月次 | パフォーマンスレビュー | SRE | 1時間 | 中 |
| 月次 | SSL証明書確認 | DevOps | 10分 | 高 |
| 月次 | データベースVACUUM | DBA | 30分 | 中 |
| **四半期** | DR訓練 | 全員 | 半日 | 高 |
| 四半期 | パフォーマンステスト | QA | 2時間 | 中 |
| 四半期 | コスト最適化レビュー | マネージャー | 1時間 | 中 |
| **年次** | セキュリティ監査 | 外部監査人 | 2日 | 高 |
| 年次 | アーキテクチャレビュー | アーキテクト | 1日 | 中 |
"""
CRONS = """
0 3 * * * /path/to/daily_backup.sh
0 0 * * * certbot renew --quiet --post-hook "systemctl reload nginx"
"""
TABLE = read_table()
EACH_ROW = pytest.mark.parametrize("row", TABLE.row, ids=lambda row: row.task)
# What a cron line of each frequency looks like.
CRON = {
    "日次": r"\d+ \d+ \* \* \*",
    "週次": r"\d+ \d+ \* \* [0-6]",
    "月次": r"\d+ \d+ \d+ \* \*",
    "四半期": r"\d+ \d+ \d+ 1,4,7,10 \*",
    "年次": r"\d+ \d+ \d+ \d+ \*",
}


def test_the_data_are_the_manual_s_rows_in_their_order() -> None:
    manual = [tuple(cell.strip(" *") for cell in line.strip("|").split("|")) for line in MANUAL.split("\n") if line]
    assert len(manual) == 18
    assert [row.cells for row in TABLE.row] == manual
    assert [cron.line for cron in TABLE.cron] == CRONS.strip().splitlines()


@EACH_ROW
def test_a_row_s_deployments_are_tagged_and_scheduled_as_it_says(row: MaintenanceRow) -> None:
    assert row.deployments
    for deployment in row.deployments:
        entry = entries()[deployment]
        assert (entry["tags"][1], *entry["tags"][3:]) == row.tags
        (cron,) = crons_of(deployment)
        assert re.fullmatch(CRON[row.frequency], cron)


@pytest.mark.parametrize("cron", TABLE.cron, ids=lambda cron: cron.section)
def test_the_manual_s_cron_lines_are_scheduled_as_they_stand(cron: maintenance.Cron) -> None:
    for deployment in cron.deployments:
        assert crons_of(deployment) == [" ".join(cron.line.split()[:5])]


def test_what_is_scheduled_is_in_the_table_with_its_duration() -> None:
    """And nothing else has a priority or a duration."""
    durations = TABLE.durations()
    assert set(durations) <= {name for name in entries() if crons_of(name)}
    assert {name for name in entries() if crons_of(name) and "continuous" not in entries()[name]["tags"]} <= set(
        durations
    )
    for name, entry in entries().items():
        expected = {duration_tag(durations[name])} if name in durations else set()
        assert {tag for tag in entry["tags"] if tag.startswith("所要")} == expected
        assert any(tag.startswith("優先度") for tag in entry["tags"]) == any(
            name in row.deployments for row in TABLE.row
        )
    named = [one for each in (*TABLE.row, *TABLE.cron, *TABLE.also) for one in each.deployments]
    assert len(named) == len(set(named)), "a deployment serves one row"


def test_every_kind_that_is_pruned_is_verified_each_week() -> None:
    """Else weekly-check warns for ever, and nothing of it is ever pruned."""

    def kinds(flow: str) -> set[str]:
        return {
            entry["parameters"].get("kind", "postgres")
            for name, entry in entries().items()
            if name.partition("/")[0] == flow and crons_of(name)
        }

    assert kinds("verify-backup") == kinds("prune-backups") == {"postgres", "redis", "files", "cluster", "prefect"}


def test_schedules_are_in_the_operators_time_zone() -> None:
    """What runs each hour is in none: there Prefect leaves out the hour that comes twice where clocks are put back."""
    found = [one for entry in entries().values() for one in entry.get("schedules") or []]
    hourly = [one for one in found if one["cron"].split()[1] == "*"]
    assert {one["timezone"] for one in hourly} == {"UTC"}
    assert {one["timezone"] for one in found if one not in hourly} == {"Asia/Tokyo"}


@pytest.mark.parametrize("day", [date(2026, 3, 8), date(2026, 11, 1)], ids=["23 hours", "25 hours"])
def test_where_clocks_change_what_is_daily_runs_once_and_what_is_hourly_each_hour(day: date) -> None:
    """As Prefect reads these lines for operators in New York, whose 2 o'clock is left out, or whose 1 comes twice."""
    new_york = ZoneInfo("America/New_York")
    begin, end = (datetime.combine(day + timedelta(days=n), time(), new_york) for n in (0, 1))
    hours = (end.astimezone(UTC) - begin.astimezone(UTC)) / timedelta(hours=1)
    for one in [one for entry in entries().values() for one in entry.get("schedules") or []]:
        minute, hour, *rest = one["cron"].split()
        zone = one["timezone"].replace("Asia/Tokyo", new_york.key)
        schedule = CronSchedule(cron=one["cron"], timezone=zone)
        found = asyncio.run(schedule.get_dates(1000, begin, end - timedelta(seconds=1)))
        if hour == "*":
            each = 60 / int(minute.removeprefix("*/")) if minute.startswith("*/") else minute.count(",") + 1
            assert len(found) == each * hours, one
        elif rest == ["*", "*", "*"]:
            (at,) = found
            assert f"{at.astimezone(new_york):%-M %-H}" == f"{minute} {hour}", one


def test_no_two_rows_begin_at_the_same_time() -> None:
    """What takes the environment's lock waits for it; the manual's own three backups begin together."""
    begins = [cron for row in TABLE.row for one in row.deployments for cron in crons_of(one)]
    assert len(begins) == len(set(begins))


def test_durations_are_read() -> None:
    assert [seconds_of(text) for text in ("5分", "2時間", "半日", "1日", "2日")] == [300, 7200, 14400, 28800, 57600]
    with pytest.raises(ValueError, match="soon is no duration"):
        seconds_of("soon")


def test_cron_lines_are_told_to_people() -> None:
    lines = (
        "30 8 * * *",
        "0 7 * * 1",
        "0 7 * * 0",
        "30 4 * * 1-6",
        "5 1 2 * *",
        "0 13 15 1,4,7,10 *",
        "0 9 1 6 *",
        "*/5 * * * *",
    )
    assert [told(line) for line in lines] == [
        "毎日 08:30",
        "毎週月曜 07:00",
        "毎週日曜 07:00",
        "毎週月曜から土曜 04:30",
        "毎月2日 01:05",
        "1・4・7・10月15日 13:00",
        "6月1日 09:00",
        "5分ごと",
    ]


def test_the_page_shows_the_data() -> None:
    page = (ROOT / "docs" / "maintenance.md").read_text(encoding="utf-8")
    assert maintenance.page() in page, "python -m deployments.maintenance prints it anew"
